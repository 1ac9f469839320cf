"""Blocks of pages, and the jobs of docs/jobs.md, whose table `tests.journeys` fills."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/jobs.md"
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^(\| \[[^]]+\]\(#([\w-]+)\) )\|([^|]*)\|([^|]*)\|([^|]*)\|", re.MULTILINE)
NOTE = re.compile(r"(<!-- journeys: begin -->\n).*?(<!-- journeys: end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    file: str | None
    """The file that the reader is to write, if it is one."""
    text: str
    line: int = 0
    """Of its fence, in the text in which it stands."""


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^\w-]", "", self.name.lower().replace(" ", "-"))

    @property
    def lines(self) -> int:
        """Lines of Python and of the shell: neither empty ones, nor remarks, nor data."""
        typed = [one.text for one in self.blocks if one.language in ("python", "bash")]
        lines = [line.strip() for text in typed for line in text.splitlines()]
        return sum(bool(line) and not line.startswith("#") for line in lines)


def blocks(text: str) -> tuple[Block, ...]:
    """All that are fenced, from top to bottom; one without a language has an empty one."""
    return tuple(
        Block(kind, file or None, source, text[: found.start()].count("\n") + 1)
        for found in BLOCK.finditer(text)
        for kind, file, source in [found.groups()]
    )


def jobs() -> Sequence[Job]:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return [Job(section.partition("\n")[0], blocks(section)) for section in sections]


def fill(minutes: Mapping[str, tuple[str, str]], note: str | None) -> None:
    """Writes lines and both times of jobs, by anchor; below the table the note, if it is one."""
    lines = {job.anchor: job.lines for job in jobs()}

    def cells(row: re.Match[str]) -> str:
        if row[2] not in minutes:
            return row[0]
        here, there = minutes[row[2]]
        return f"{row[1]}| {lines[row[2]]} | {here} | {there} |"

    text = ROW.sub(cells, PAGE.read_text())
    if note is not None:
        text = NOTE.sub(lambda found: f"{found[1]}{note}\n{found[2]}", text)
    PAGE.write_text(text)


def table() -> Mapping[str, tuple[str, str, str]]:
    """The lines and both times of every job as the page has them, by its anchor."""
    rows = ROW.finditer(PAGE.read_text())
    return {row[2]: (row[3].strip(), row[4].strip(), row[5].strip()) for row in rows}
