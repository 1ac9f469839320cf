"""How commands print, find what is meant, and reach a service."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from enum import StrEnum
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from weaver.config import environment
from weaver.errors import InvalidParamsError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from weaver.protocol import Service
    from weaver.types import Value

T = TypeVar("T")


class Format(StrEnum):
    table = "table"
    json = "json"
    tsv = "tsv"


Output = Annotated[Format, typer.Option("--output", "-o", help="What is printed.")]
Wide = Annotated[bool, typer.Option("--wide", help="All columns, however wide.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
GAP = "  "


def show(
    rows: Sequence[Value],
    output: Format = Format.table,
    *,
    columns: Sequence[str] | None = None,
    wide: bool = False,
    empty: str = "",
) -> None:
    """A list of things: a table for people, tab-separated values or a JSON array for programs.

    The table keeps to a terminal's width by leaving out columns, never by breaking what is in one:
    ids are there to be copied.

    Args:
        columns: of the table, the most important first; None: all fields.
        wide: all fields, however wide.
    """
    if output is Format.json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    if not rows and output is Format.table:
        print(empty)
        return
    fields = list(rows[0].model_dump()) if rows else []
    names = [*(columns or fields)]
    if output is Format.tsv or wide:
        names += [name for name in fields if name not in names]
    if output is Format.tsv:
        for line in [names, *([_exact(getattr(row, n)) for n in names] for row in rows)]:
            print("\t".join(line))
        return
    from rich.cells import cell_len, set_cell_size

    cells = {name: [name, *(_told(name, getattr(row, name)) for row in rows)] for name in names}
    widths = {name: max(map(cell_len, column)) for name, column in cells.items()}
    room = None if wide else _width()
    while room and len(names) > 1 and sum(widths[n] + len(GAP) for n in names) - len(GAP) > room:
        names.pop()
    for number in range(len(rows) + 1):
        padded = (set_cell_size(cells[name][number], widths[name]) for name in names)
        print(GAP.join(padded).rstrip())
    if len(names) < len(cells):
        print(f"--wide shows {', '.join(list(cells)[len(names) :])} too.", file=sys.stderr)


def _width() -> int | None:
    """Of the terminal; None where nobody looks at one, nor says how wide it would be."""
    if sys.stdout.isatty() or "COLUMNS" in environment():
        return get_terminal_size().columns
    return None


def _told(name: str, value: object) -> str:
    """A value as people read it: times from now, sizes in GB."""
    if isinstance(value, datetime):
        return ago((value - datetime.now(value.tzinfo)).total_seconds())
    if name == "size_bytes" and isinstance(value, int):
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    return _exact(value)


def _exact(value: object) -> str:
    """On one line, whatever is in it."""
    if value is None:
        return ""
    if hasattr(value, "model_dump_json"):
        return str(value.model_dump_json(exclude_none=True))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    return "".join(c if c.isprintable() else "·" for c in text)


def ago(seconds: float) -> str:
    """A time by how far it is from now: `3 min ago`, `in 2 days`."""
    away = abs(seconds)
    for unit, least in (("days", 2 * 86_400), ("h", 2 * 3600), ("min", 120), ("s", 0)):
        if away >= least:
            text = f"{away / (least / 2 or 1):.0f} {unit}"
            return f"in {text}" if seconds > 0 else f"{text} ago"
    raise AssertionError(seconds)


def seconds_of(age: str, *, field: str) -> float:
    """Of `7d` and the like. Raises InvalidParamsError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    if not (age[-1:] in units and age[:-1].isdecimal()):
        raise InvalidParamsError(
            f"is {age!r}.", field=field, hint="A number and s, m, h, d or w: 7d."
        )
    return float(age[:-1]) * units[age[-1]]


def show_one(item: Value, output: Format = Format.table, **more: object) -> None:
    """One thing, and `more` of it: a line for each field, or a JSON object."""
    fields = {**item.model_dump(mode="json"), **more}
    if output is Format.json:
        print(json.dumps(fields, indent=2))
        return
    from weaver.curves import number_text

    lines = [
        line
        for name, value in fields.items()
        for line in (
            [(name, ""), *((f"  {key}", each) for key, each in value.items())]
            if isinstance(value, dict) and value
            else [(name, value)]
        )
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        text = number_text(value) if isinstance(value, float) else _exact(value)
        print(f"{name}\t{text}" if output is Format.tsv else f"{name:<{width}}  {text}".rstrip())


def confirm(question: str, yes: bool) -> None:
    """Ends the command, unless it was told `--yes` or is told so now."""
    if not yes:
        typer.confirm(question, abort=True)


def find(
    given: str,
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    what: str,
    within: bool = False,
    alias: Callable[[T], str | None] = lambda item: None,
    shown_by: str = "",
) -> T:
    """The item that is called `given`, or the only one whose name begins so.

    A name may be given without what is before its first `-`, or without its folders. `within`: also
    by any other part of it. `alias`: another name, which counts as much.

    Raises:
        NotFoundError: none, or more than one; names them.
    """

    def ways(full: str, also: str) -> tuple[bool, bool, bool]:
        exact = given in (full, also) or full.endswith(f"/{given}")
        begun = (full, full.partition("-")[2], also)
        return exact, any(one.startswith(given) for one in begun), within and given in full

    fitting = [(item, ways(name(item), alias(item) or "")) for item in items if given]
    sieved = ([item for item, fits in fitting if fits[way]] for way in range(3))
    found = next(filter(None, sieved), [])
    if len(found) != 1:
        names = ", ".join(name(item) for item in found[:5])
        raise NotFoundError(
            f"{len(found) or 'no'} {what} match {given!r}{': ' + names if names else ''}.",
            hint=f"`{shown_by or f'weaver {what} list'}` shows them.",
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
