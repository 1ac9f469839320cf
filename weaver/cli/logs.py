"""`weaver logs`: what the server of a home has said, on the machine where it runs."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.output import Format, Output, seconds_of
from weaver.cli.serve import DEFAULTS, Home
from weaver.config import LogLevel, command
from weaver.errors import NotFoundError

if TYPE_CHECKING:
    from weaver.server.logs import Line


def logs(
    home: Home = DEFAULTS.home,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    count: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="The last so many; 100 by default.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="All that are not older: 30s, 90m, 12h, 7d.")
    ] = None,
    level: Annotated[
        LogLevel, typer.Option("--level", "-l", help="Of this level at least.")
    ] = "debug",
    output: Output = Format.table,
) -> None:
    """Print what the server of a home has said lately; -o json as it is in the file."""
    from weaver.server.logs import FILE, follow_log, read_log

    home = home.expanduser()
    if not (home / FILE).exists():
        serve = command("weaver serve", home)
        raise NotFoundError(f"there is no {home / FILE}.", hint=f"`{serve}` writes it.")
    from_s = None if since is None else time.time() - seconds_of(since, field="since")
    if count is None and since is None:
        count = 100
    for line in read_log(home, level=level, since=from_s, last=count):
        _print(line, output)
    if follow:
        for line in follow_log(home, level=level):
            _print(line, output)


def _print(line: Line, output: Format) -> None:
    from weaver.server.logs import CONTROL

    if output is Format.json:
        print(json.dumps(line), flush=True)
        return
    names = ("time", "level", "logger", "request_id", "message")
    words = [CONTROL.sub("·", str(line.get(name, ""))) for name in names]
    if output is Format.tsv:
        print("\t".join(words), flush=True)
        return
    at, severity, logger, request_id, message = words
    print(
        f"{at[:19].replace('T', ' ')} {severity:<7} {logger} [{request_id}] {message}", flush=True
    )
    for text in str(line.get("traceback", "")).splitlines():
        print(f"    {CONTROL.sub('·', text)}", flush=True)
