"""The log of a server in its home: `LogFile` writes it, `weaver logs` reads it by `read_log`.

One JSON object a line, in `logs/server.log` and up to four older files beside it: 40 MB at most. It
has what is also on stderr: never a key, a prompt or a reply.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections import deque
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FILE = Path("logs", "server.log")
"""Below a home."""
MAX_BYTES = 8 * 10**6
OLDER = 4
"""Files behind the newest."""
LOOK_S = 0.5
"""Between two looks at a log that is followed."""
Line = dict[str, Any]
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What must not reach a terminal, nor begin a line of its own."""


class LogFile(RotatingFileHandler):
    """A home's log, which only its owner may read."""

    def __init__(self, home: Path, *, max_bytes: int = MAX_BYTES, older: int = OLDER) -> None:
        (home / FILE).parent.mkdir(parents=True, exist_ok=True)
        super().__init__(home / FILE, maxBytes=max_bytes, backupCount=older, encoding="utf-8")
        self._failed = False

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said once, on stderr; the server goes on without its log."""
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"{self.baseFilename} cannot be written to: {sys.exc_info()[1]}\n")


def read_log(
    home: Path, *, level: str = "debug", since: float | None = None, last: int | None = None
) -> Iterator[Line]:
    """The lines of a home, oldest first, of this level at least.

    Args:
        since: seconds since the epoch.
        last: so many of them.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    newest = home / FILE
    newest.stat()
    older = (newest.with_name(f"{newest.name}.{n}") for n in range(OLDER, 0, -1))
    lines = _all_lines(path for path in (*older, newest) if path.exists())
    wanted = (line for line in lines if _wanted(line, level, since))
    yield from wanted if last is None else deque(wanted, maxlen=last)


def follow_log(home: Path, *, level: str = "debug") -> Iterator[Line]:
    """What is written from now on, also where a new file begins; for good."""
    path, from_its_end = home / FILE, True
    while True:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END if from_its_end else os.SEEK_SET)
            from_its_end = newer = False
            while not newer:
                newer = _is_another(path, file)  # what was written to this one before is read yet
                yield from (line for line in _lines(file) if _wanted(line, level, None))
                if not newer:
                    time.sleep(LOOK_S)


def _is_another(path: Path, file: IO[bytes]) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:  # it is being moved
        return False


def _all_lines(paths: Iterable[Path]) -> Iterator[Line]:
    for path in paths:
        with path.open("rb") as file:
            yield from _lines(file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lines(file: IO[bytes]) -> Iterator[Line]:
    """Those from where the file stands on that are whole; it then stands behind them."""
    while text := file.readline():
        if not text.endswith(b"\n"):  # it is being written
            file.seek(-len(text), os.SEEK_CUR)
            return
        try:
            line = json.loads(text)
        except ValueError:  # the disk was full in the midst of it
            continue
        if isinstance(line, dict):
            yield line


def _wanted(line: Line, level: str, since: float | None) -> bool:
    known = logging.getLevelNamesMapping()
    if known.get(str(line.get("level")), logging.INFO) < known[level.upper()]:
        return False
    return since is None or at(line) >= since


def at(line: Line) -> float:
    """When it was written, in seconds since the epoch."""
    try:
        return datetime.strptime(str(line.get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0
