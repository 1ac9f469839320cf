"""`weaver keys`: API keys of the server whose home this is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Json, find, show, show_one
from weaver.cli.serve import DEFAULTS, flag

if TYPE_CHECKING:
    from weaver.server.keys import Keys

app = typer.Typer(help="API keys of the server on this machine.", no_args_is_help=True)
Home = Annotated[Path, flag("home")]
Database = Annotated[str | None, flag("database_url")]


@app.command()
def create(
    project: Annotated[str, typer.Option(help="What is made with the key belongs to it.")],
    name: Annotated[str, typer.Option(help="A note for the list.")] = "",
    admin: Annotated[bool, typer.Option(help="May see every project.")] = False,
    home: Home = DEFAULTS.home,
    database_url: Database = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once and cannot be read again."""
    info, secret = _keys(home, database_url).create(project, name=name, admin=admin)
    if as_json:
        show_one({**info.model_dump(mode="json"), "key": secret}, as_json=True)
        return
    sys.stdout.write(f"{secret}\n")
    sys.stderr.write(f"Key {info.id} of project {project}. Keep it: it is not shown again.\n")


@app.command("list")
def list_keys(
    home: Home = DEFAULTS.home, database_url: Database = None, as_json: Json = False
) -> None:
    """List keys, without their secrets."""
    rows = [info.model_dump(mode="json") for info in _keys(home, database_url).list()]
    show(rows, as_json=as_json, empty="No keys; `weaver keys create` makes one.")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id, or its beginning.")],
    home: Home = DEFAULTS.home,
    database_url: Database = None,
) -> None:
    """End a key; requests with it are refused from now on."""
    keys = _keys(home, database_url)
    info = find(key_id, keys.list(), name=lambda key: key.id, what="keys")
    keys.revoke(info.id)
    sys.stdout.write(f"Revoked key {info.id} of project {info.project}.\n")


def _keys(home: Path, database_url: str | None) -> Keys:
    from weaver.server.database import open_database
    from weaver.server.keys import Keys

    return Keys(open_database(home.expanduser(), database_url))
