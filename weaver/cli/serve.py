"""`weaver serve`: the server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weaver.server.http.run import Running


def _read_config(context: typer.Context, path: str | None) -> str | None:
    """The other options find their defaults in the file, as this one is eager."""
    if path is not None:
        from pathlib import Path

        from weaver.cli.config_file import parse_config

        context.default_map = parse_config(Path(path).expanduser(), serve)
    return path


def serve(
    config: Annotated[
        str | None,
        typer.Option(
            envvar="WEAVER_CONFIG",
            is_eager=True,
            callback=_read_config,
            help="A TOML file with these options, which flags and variables override.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(envvar="WEAVER_HOST", help="To listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="WEAVER_PORT", help="0 takes a free one.")] = 8000,
    model: Annotated[
        list[str] | None,
        typer.Option(
            envvar="WEAVER_MODEL",
            help="[NAME=]FOLDER_OR_HUB_ID to serve beside weaver-nano; may be repeated.",
        ),
    ] = None,
    home: Annotated[str, typer.Option(envvar="WEAVER_HOME", help="Where all is kept.")] = (
        "~/.weaver"
    ),
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="WEAVER_DATABASE_URL", help="Of all but checkpoints; SQLite in the home."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(envvar="WEAVER_DTYPE", help="Of base weights.")] = "float32",
    device: Annotated[str, typer.Option(envvar="WEAVER_DEVICE", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(envvar="WEAVER_THREADS", help="0: by size.")] = 0,
    deterministic: Annotated[
        bool,
        typer.Option(envvar="WEAVER_DETERMINISTIC", help="No result depends on what else runs."),
    ] = False,
    snapshot_every: Annotated[
        float, typer.Option(envvar="WEAVER_SNAPSHOT_EVERY", help="Seconds, at least, of a run.")
    ] = 10.0,
    snapshot_every_steps: Annotated[
        int, typer.Option(envvar="WEAVER_SNAPSHOT_EVERY_STEPS", help="Steps, at least, of a run.")
    ] = 1,
    idle_run_seconds: Annotated[
        float,
        typer.Option(envvar="WEAVER_IDLE_RUN_SECONDS", help="After which a run leaves memory."),
    ] = 1800.0,
    session_timeout: Annotated[
        float,
        typer.Option(
            envvar="WEAVER_SESSION_TIMEOUT", min=120, help="Seconds until a silent client is gone."
        ),
    ] = 600.0,
    max_body_bytes: Annotated[
        int, typer.Option(envvar="WEAVER_MAX_BODY_BYTES", min=2**16, help="Of a request.")
    ] = 2**28,
    max_operation_tokens: Annotated[
        int, typer.Option(envvar="WEAVER_MAX_OPERATION_TOKENS", min=1, help="Of an operation.")
    ] = 2**22,
    max_pending: Annotated[
        int, typer.Option(envvar="WEAVER_MAX_PENDING", min=256, help="Operations of a project.")
    ] = 2**14,
    max_runs: Annotated[
        int | None, typer.Option(envvar="WEAVER_MAX_RUNS", min=0, help="Of a project.")
    ] = None,
    max_stored_bytes: Annotated[
        int | None,
        typer.Option(envvar="WEAVER_MAX_STORED_BYTES", min=0, help="Checkpoints of a project."),
    ] = None,
    auth: Annotated[
        bool, typer.Option(envvar="WEAVER_AUTH", help="Ask for API keys; off only on loopback.")
    ] = True,
    log_json: Annotated[
        bool, typer.Option(envvar="WEAVER_LOG_JSON", help="Log lines of JSON.")
    ] = False,
) -> None:
    """Serve models to many clients, until Ctrl-C or SIGTERM."""
    from functools import partial
    from pathlib import Path

    import anyio

    from weaver.errors import MissingDependencyError

    try:
        from weaver.engine.engine import TorchEngine
        from weaver.server.http.logs import configure_logs
        from weaver.server.http.run import ServerSettings, run_server
        from weaver.server.limits import Limits
        from weaver.server.recovery import Durability
    except ImportError as error:
        raise MissingDependencyError(
            f"the server needs {error.name}.",
            hint='Run: pip install "weaver-post-training[server,engine]"',
        ) from error
    configure_logs(as_json=log_json)
    engine = TorchEngine(
        parse_models(model or []),
        allow_paths=False,
        device=device,
        dtype=dtype,
        threads=threads,
        deterministic=deterministic,
    )
    for name in engine.list_models():
        sys.stderr.write(f"serving {name.name} ({name.num_parameters:,} parameters)\n")
    settings = ServerSettings(
        home=Path(home).expanduser(),
        host=host,
        port=port,
        database_url=database_url,
        auth=auth,
        deterministic=deterministic,
        durability=Durability(
            snapshot_every_s=snapshot_every,
            snapshot_every_steps=snapshot_every_steps,
            unload_after_s=idle_run_seconds,
        ),
        limits=Limits(
            body_bytes=max_body_bytes,
            operation_tokens=max_operation_tokens,
            pending_operations=max_pending,
            runs=max_runs,
            stored_bytes=max_stored_bytes,
            session_timeout_s=session_timeout,
        ),
    )
    anyio.run(partial(run_server, engine, settings, started=partial(_tell, auth)))
    engine.close()


def parse_models(given: Sequence[str]) -> Mapping[str, str | Path]:
    """`NAME=SOURCE` is served under its name and its source as given, a bare source under that."""
    from pathlib import Path

    models: dict[str, str | Path] = {}
    for item in given:
        name, _, source = item.rpartition("=")
        folder = Path(source).expanduser()
        for alias in (name, source):
            if alias:
                models[alias] = folder.absolute() if folder.is_dir() else source
    return models


def _tell(auth: bool, server: Running) -> None:
    keys = "with API keys" if auth else "without keys, to this machine only"
    sys.stderr.write(f"Weaver at {server.address} ({keys}); Ctrl-C stops it.\n")
    if auth:
        sys.stderr.write("`weaver keys create --project NAME` makes a key.\n")
