"""`weaver serve`: the server."""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weaver.errors import requiring

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.server.serve import Running, ServerSettings


def _option(variable: str, help: str, *, least: int | None = None, most: int | None = None) -> Any:
    return typer.Option(envvar=f"WEAVER_{variable}", help=help, min=least, max=most)


def _read_config(context: typer.Context, path: str | None) -> str | None:
    """The other options find their defaults in the file, as this one is eager."""
    if path is not None:
        from weaver.cli.config_file import parse_config

        context.default_map = parse_config(Path(path).expanduser(), serve)
    return path


Config = Annotated[
    str | None,
    typer.Option(
        envvar="WEAVER_CONFIG",
        is_eager=True,
        callback=_read_config,
        help="A TOML file with these options, which flags and variables override.",
    ),
]
Host = Annotated[str, _option("HOST", "To listen on.")]
Port = Annotated[int, _option("PORT", "0 takes a free one.", least=0, most=2**16 - 1)]
Models = Annotated[
    list[str] | None,
    _option("MODEL", "[NAME=]FOLDER_OR_HUB_ID to serve beside weaver-nano; may be repeated."),
]
Home = Annotated[str, _option("HOME", "Where all is kept.")]
DatabaseUrl = Annotated[
    str | None, _option("DATABASE_URL", "Of all but checkpoints; SQLite in the home.")
]
Dtype = Annotated[str, _option("DTYPE", "Of base weights.")]
Device = Annotated[str, _option("DEVICE", "cpu or cuda.")]
Threads = Annotated[int, _option("THREADS", "0: by size.", least=0)]
Deterministic = Annotated[bool, _option("DETERMINISTIC", "No result depends on what else runs.")]
SnapshotEvery = Annotated[float, _option("SNAPSHOT_EVERY", "Seconds, at least, of a run.", least=0)]
SnapshotSteps = Annotated[
    int, _option("SNAPSHOT_EVERY_STEPS", "Steps, at least, of a run.", least=1)
]
IdleSeconds = Annotated[
    float, _option("IDLE_RUN_SECONDS", "After which a run leaves memory.", least=0)
]
SessionTimeout = Annotated[
    float, _option("SESSION_TIMEOUT", "Seconds until a silent client is gone.", least=120)
]
BodyBytes = Annotated[int, _option("MAX_BODY_BYTES", "Of a request.", least=2**16)]
OperationTokens = Annotated[int, _option("MAX_OPERATION_TOKENS", "Of an operation.", least=1)]
Pending = Annotated[int, _option("MAX_PENDING", "Operations of a project.", least=256)]
PendingBytes = Annotated[
    int, _option("MAX_PENDING_BYTES", "Of a project's operations and outcomes.", least=2**26)
]
Runs = Annotated[int | None, _option("MAX_RUNS", "Of a project.", least=0)]
StoredBytes = Annotated[
    int | None, _option("MAX_STORED_BYTES", "Checkpoints of a project.", least=0)
]
Auth = Annotated[bool, _option("AUTH", "Ask for API keys; off only on loopback.")]
OtelEndpoint = Annotated[
    str | None,
    typer.Option(
        envvar=[
            "WEAVER_OTEL_ENDPOINT",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        ],
        help="Of a collector of OpenTelemetry traces, such as http://127.0.0.1:4318.",
    ),
]
LogJson = Annotated[bool, _option("LOG_JSON", "Log lines of JSON.")]


def serve(
    config: Config = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    model: Models = None,
    home: Home = "~/.weaver",
    database_url: DatabaseUrl = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
    deterministic: Deterministic = False,
    snapshot_every: SnapshotEvery = 10.0,
    snapshot_every_steps: SnapshotSteps = 1,
    idle_run_seconds: IdleSeconds = 1800.0,
    session_timeout: SessionTimeout = 600.0,
    max_body_bytes: BodyBytes = 2**28,
    max_operation_tokens: OperationTokens = 2**22,
    max_pending: Pending = 16_384,
    max_pending_bytes: PendingBytes = 2**30,
    max_runs: Runs = None,
    max_stored_bytes: StoredBytes = None,
    auth: Auth = True,
    otel_endpoint: OtelEndpoint = None,
    log_json: LogJson = False,
) -> None:
    """Serve models to many clients, until Ctrl-C or SIGTERM."""
    with requiring("the server", "server,engine"):
        from weaver.server.limits import Limits
        from weaver.server.recovery import Durability
        from weaver.server.serve import ServerSettings
    settings = ServerSettings(
        home=Path(home).expanduser(),
        host=host,
        port=port,
        database_url=database_url,
        auth=auth,
        deterministic=deterministic,
        otel_endpoint=otel_endpoint,
        durability=Durability(
            snapshot_every_s=snapshot_every,
            snapshot_every_steps=snapshot_every_steps,
            unload_after_s=idle_run_seconds,
        ),
        limits=Limits(
            body_bytes=max_body_bytes,
            operation_tokens=max_operation_tokens,
            pending_operations=max_pending,
            pending_bytes=max_pending_bytes,
            runs=max_runs,
            stored_bytes=max_stored_bytes,
            session_timeout_s=session_timeout,
        ),
    )
    models = parse_models(model or [])
    _run(settings, models=models, device=device, dtype=dtype, threads=threads, log_json=log_json)


def _run(
    settings: ServerSettings,
    *,
    models: Mapping[str, str | Path],
    device: str,
    dtype: str,
    threads: int,
    log_json: bool,
) -> None:
    """Until it is stopped, with an engine of its own."""
    import anyio

    with requiring("the server", "server,engine"):
        from weaver.engine.torch.engine import TorchEngine
        from weaver.server.http.telemetry import configure_logs
        from weaver.server.serve import run_server
    configure_logs(as_json=log_json)
    engine = TorchEngine(
        models,
        allow_paths=False,
        device=device,
        dtype=dtype,
        threads=threads,
        deterministic=settings.deterministic,
    )
    with closing(engine):
        for name in engine.list_models():
            sys.stderr.write(f"serving {name.name} ({name.num_parameters:,} parameters)\n")
        anyio.run(partial(run_server, engine, settings, started=partial(_tell, settings.auth)))


def parse_models(given: Sequence[str]) -> Mapping[str, str | Path]:
    """`NAME=SOURCE` is served under its name and its source as given, a bare source under that."""
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
