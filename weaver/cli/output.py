"""How commands print, find what is meant, and reach a service."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from weaver.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from weaver.protocol import Service
    from weaver.types import Value

T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def show(rows: Sequence[Value], *, as_json: bool, empty: str, hide: Collection[str] = ()) -> None:
    """A list of things: a table for people, without what to `hide`, or a JSON array for programs.

    The table keeps to a terminal's width: what is longer goes on below itself, to be copied.
    """
    items = [row.model_dump(mode="json") for row in rows]
    if as_json:
        print(json.dumps(items, indent=2))
        return
    if not items:
        print(empty)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = [name for name in items[0] if name not in hide]
    for name in columns:
        table.add_column(name, overflow="fold")
    for item in items:
        table.add_row(*(Text(_cell(item[name])) for name in columns))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_one(item: Value, *, as_json: bool, **more: object) -> None:
    """One thing, and `more` of it: a line for each field, or a JSON object."""
    fields = {**item.model_dump(mode="json"), **more}
    if as_json:
        print(json.dumps(fields, indent=2))
        return
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {value}")


def confirm(question: str, yes: bool) -> None:
    """Ends the command, unless it was told `--yes` or is told so now."""
    if not yes:
        typer.confirm(question, abort=True)


def find(
    given: str, items: Sequence[T], *, name: Callable[[T], str], what: str, within: bool = False
) -> T:
    """The item that is called `given`, or the only one whose name begins so.

    A name may be given without what is before its first `-`, or without its folders. `within`: also
    by any other part of it.

    Raises:
        NotFoundError: none, or more than one; names them.
    """

    def ways(full: str) -> tuple[bool, bool, bool]:
        exact = given == full or full.endswith(f"/{given}")
        begins = full.startswith(given) or full.partition("-")[2].startswith(given)
        return exact, begins, within and given in full

    fitting = [(item, ways(name(item))) for item in items if given]
    sieved = ([item for item, fits in fitting if fits[way]] for way in range(3))
    found = next(filter(None, sieved), [])
    if len(found) != 1:
        names = ", ".join(name(item) for item in found[:5])
        raise NotFoundError(
            f"{len(found) or 'no'} {what} match {given!r}{': ' + names if names else ''}.",
            hint=f"`weaver {what} list` shows them.",
        )
    return found[0]


def ask(question: Callable[[Service], Awaitable[T]]) -> T:
    """Asks the configured service, and waits for the answer."""
    import anyio

    from weaver.client.opening import open_service
    from weaver.config import load_settings

    async def run() -> T:
        async with open_service(load_settings(), patient=False) as service:
            return await question(service)

    return anyio.run(run)
