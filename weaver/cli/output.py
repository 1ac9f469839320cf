"""How commands print, and how they reach a service."""

from __future__ import annotations

import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from weaver.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from weaver.protocol import Service

T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str) -> None:
    """A list of things: a table for people, or a JSON array for programs."""
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2, default=str) + "\n")
        return
    if not rows:
        sys.stdout.write(f"{empty}\n")
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    if sys.stdout.isatty():
        _show_table(lines)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show_table(lines: Sequence[Sequence[str]]) -> None:
    """On a terminal, whose width it keeps to: what is longer goes on below itself, to be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in lines[0]:
        table.add_column(name, overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    Console().print(table)


def show_one(fields: Mapping[str, Any], *, as_json: bool) -> None:
    """One thing: a line for each field, or a JSON object."""
    if as_json:
        sys.stdout.write(json.dumps(fields, indent=2, default=str) + "\n")
        return
    width = max(map(len, fields))
    for name, value in fields.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


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

    async def run() -> T:
        async with _service() as service:
            return await question(service)

    return anyio.run(run)


@asynccontextmanager
async def _service() -> AsyncIterator[Service]:
    from weaver.config import load_settings

    settings = load_settings()
    if settings.base_url is None:
        from weaver.client.embedded import embedded_service

        async with embedded_service(settings) as service:
            yield service
    else:
        from weaver.client.http import FIRST_CONTACT_S, HttpService

        async with HttpService(
            settings.base_url, api_key=settings.api_key, outage_s=FIRST_CONTACT_S
        ) as remote:
            yield remote
