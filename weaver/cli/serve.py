"""`weaver serve`: the server. Its options are the fields of `ServerSettings`.

An option is what its flag says, else its variable, else the file of `--config`, else its default.
"""

from __future__ import annotations

import inspect
import sys
import tomllib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weaver.config import changed, options
from weaver.errors import ConfigError, nearest, requiring
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.server.serve import Running

DEFAULTS = ServerSettings()
OPTIONS = {option.name: option for option in options(DEFAULTS)}


def flag(name: str) -> Any:
    """The option of a command that sets this one of the server's settings."""
    option = OPTIONS[name]
    return typer.Option(
        envvar=list(option.variables), help=option.help, min=option.least, max=option.most
    )


def parse_config(file: Path) -> dict[str, Any]:
    """The options that the file sets, by the names of their flags.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        given = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}", field="config", hint="It has to be a TOML file."
        ) from None
    values = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in OPTIONS:
            known = [name.replace("_", "-") for name in OPTIONS]
            raise ConfigError(
                f"{file} has the unknown key {key!r}.", field="config", hint=nearest(key, known)
            )
        try:
            values[name] = TypeAdapter(OPTIONS[name].type).validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"{file}: {key} is {value!r}.",
                field="config",
                hint=f"{error.errors()[0]['msg']}.",
            ) from None
    return values


def _read_config(context: typer.Context, path: str | None) -> str | None:
    """The other options find their defaults in the file, as this one is eager."""
    if path is not None:
        context.default_map = parse_config(Path(path).expanduser())
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


def serve(config: Config = None, **given: Any) -> None:
    """Serve models to many clients, until Ctrl-C or SIGTERM."""
    import anyio

    with requiring("the server", "server,engine"):
        from weaver.engine.torch.engine import TorchEngine
        from weaver.server.http.telemetry import configure_logs
        from weaver.server.serve import run_server
    settings = changed(DEFAULTS, given)
    configure_logs(as_json=settings.log_json)
    engine = TorchEngine(
        parse_models(settings.models or []),
        allow_paths=False,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        deterministic=settings.deterministic,
    )
    with closing(engine):
        for name in engine.list_models():
            sys.stderr.write(f"serving {name.name} ({name.num_parameters:,} parameters)\n")
        anyio.run(partial(run_server, engine, settings, started=partial(_tell, settings.auth)))


def _signature() -> inspect.Signature:
    """That of `serve` with a parameter for each option, as typer wants it."""
    signature = inspect.signature(serve, eval_str=True)
    named = (
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[option.type, flag(name)],
        )
        for name, option in OPTIONS.items()
    )
    return signature.replace(parameters=[signature.parameters["config"], *named])


vars(serve)["__signature__"] = _signature()


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
