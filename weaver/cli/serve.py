"""`weaver serve` and `weaver keys`: the server of this machine, and its API keys.

Options are the fields of `ServerSettings`. One is what its flag says, else its variable, else the
file of `--config`, else its default.
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

from weaver.cli import completion
from weaver.cli.output import Format, Output, Wide, find, show, show_one
from weaver.config import changed, command, options
from weaver.engine.sources import parse_models, table_text
from weaver.errors import ConfigError, nearest, requiring
from weaver.server.preflight import check_start
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.engine.cluster.engine import ClusterEngine
    from weaver.engine.cluster.pooled import PooledEngine
    from weaver.engine.torch.engine import TorchEngine
    from weaver.server.keys import Keys
    from weaver.server.serve import Running

keys = typer.Typer(help="API keys of the server on this machine.", no_args_is_help=True)
DEFAULTS = ServerSettings()
OPTIONS = {option.name: option for option in options(DEFAULTS)}


def flag(name: str) -> Any:
    """The option of a command that sets this one of the server's settings."""
    option = OPTIONS[name]
    first, *others = option.variables
    variables = [first, *others] if others else first  # a list is shown as one in errors
    return typer.Option(envvar=variables, help=option.help, min=option.least, max=option.most)


Project = Annotated[
    str,
    typer.Option(
        help="What is made with the key belongs to it.", autocompletion=completion.projects
    ),
]
Home = Annotated[Path, flag("home")]
Database = Annotated[str | None, flag("database_url")]


def parse_config(file: Path) -> dict[str, Any]:
    """The options that the file sets, by the names of their flags.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key, or a value of another type or
            out of bounds.
    """
    from pydantic import Field, TypeAdapter, ValidationError

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
        if name == "model" and isinstance(value, list):
            value = [table_text(one) if isinstance(one, dict) else one for one in value]
        option = OPTIONS[name]
        kind: Any = Annotated[option.type, Field(ge=option.least, le=option.most)]
        try:
            values[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"{file}: {key} is {value!r}.", field="config", hint=f"{error.errors()[0]['msg']}."
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
    settings = changed(DEFAULTS, given)
    serve_until_stopped(settings, started=partial(_tell, settings))


def serve_until_stopped(settings: ServerSettings, *, started: Callable[[Running], None]) -> None:
    """Looks whether it can start, loads what it has to, and serves."""
    import anyio

    models = parse_models(settings.models or [])
    check_start(settings)
    with requiring("the server", "server,engine"):
        from weaver.engine.local import open_engine
        from weaver.engine.torch.device import size_text
        from weaver.server.http.telemetry import configure_logs
        from weaver.server.serve import run_server
    configure_logs(as_json=settings.log_json, level=settings.log_level, home=settings.home)
    engine: TorchEngine | PooledEngine | ClusterEngine
    if settings.cluster or settings.ray:
        from weaver.engine.cluster.pooled_cluster import open_cluster

        engine = open_cluster(
            settings, models, file=settings.cluster, address=settings.ray, allow_paths=False
        )
    else:
        engine = open_engine(settings, models, allow_paths=False)
    with closing(engine):
        print(f"computing with {engine.description}", file=sys.stderr)
        for model in engine.prepare():
            size = f"{size_text(model.size_bytes)}, context of {model.context_length:,} tokens"
            words = f"{model.num_parameters:,} parameters, {size}{', loaded' * bool(model.loaded)}"
            print(f"serving {model.name} ({words})", file=sys.stderr)
        anyio.run(partial(run_server, engine, settings, started=started))


def signature_of(function: Callable[..., None]) -> inspect.Signature:
    """Its own parameters, with one for each option in place of `given`, as typer wants it."""
    *own, _given = inspect.signature(function, eval_str=True).parameters.values()
    named = (
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[option.type, flag(name)],
        )
        for name, option in OPTIONS.items()
    )
    return inspect.Signature([*own, *named])


vars(serve)["__signature__"] = signature_of(serve)


def _tell(settings: ServerSettings, server: Running) -> None:
    how = "with API keys" if settings.auth else "without keys, to this machine only"
    print(f"Weaver at {server.address} ({how}); Ctrl-C stops it.", file=sys.stderr)
    if settings.auth:
        create = command("weaver keys create --project NAME", settings.home)
        print(f"`{create}` makes a key.", file=sys.stderr)


@keys.command()
def create(
    project: Project,
    name: Annotated[str, typer.Option(help="A note for the list.")] = "",
    admin: Annotated[bool, typer.Option(help="May see every project.")] = False,
    home: Home = DEFAULTS.home,
    database_url: Database = None,
    output: Output = Format.table,
) -> None:
    """Make a key. It is shown this once and cannot be read again."""
    info, secret = open_keys(home, database_url).create(project, name=name, admin=admin)
    if output is not Format.table:
        show_one(info, output, key=secret)
        return
    print(secret)
    print(f"Key {info.id} of project {project}. Keep it: it is not shown again.", file=sys.stderr)


@keys.command("list")
def list_keys(
    home: Home = DEFAULTS.home,
    database_url: Database = None,
    output: Output = Format.table,
    wide: Wide = False,
) -> None:
    """List keys, without their secrets."""
    found = open_keys(home, database_url).list()
    create = command("weaver keys create --project NAME", home)
    show(found, output, wide=wide, empty=f"No keys; `{create}` makes one.")


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id, or its beginning.")],
    home: Home = DEFAULTS.home,
    database_url: Database = None,
) -> None:
    """End a key; requests with it are refused from now on."""
    known = open_keys(home, database_url)
    listed = command("weaver keys list", home)
    info = find(key_id, known.list(), name=lambda key: key.id, what="keys", shown_by=listed)
    known.revoke(info.id)
    print(f"Revoked key {info.id} of project {info.project}.")


def open_keys(home: Path, database_url: str | None) -> Keys:
    with requiring("a list of keys", "server"):
        from weaver.server.database import open_database
        from weaver.server.keys import Keys
    return Keys(open_database(home.expanduser(), database_url))
