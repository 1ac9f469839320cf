"""The run on the terminal: progress, numbers, a curve as it rises, hints; loops log to it.

Lively where standard output is a terminal, or the cell of a notebook; one plain line a step where
it is neither. A loop that has no run shows its `Progress` alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import IO, Any

from weaver.curves import draw_curve, number_text
from weaver.errors import requiring
from weaver_rl.loggers import Logger, prompt_text
from weaver_rl.metrics import find_hints
from weaver_rl.notebook import open_area, text_html
from weaver_rl.pace import Pace
from weaver_rl.types import Group, Rollout

__all__ = ["Display", "draw_curve"]

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean",)),
    ("loss", ("train/loss",)),
    ("KL", ("train/kl_k3",)),
    ("entropy", ("train/entropy", "policy/surprise")),
    ("tokens/s", ("tokens/per_second",)),
    ("gap", ("gap/max",)),
    ("held-out", ("eval/mean",)),
)
"""What is shown, and the metrics it may come from, the first that is there."""
CURVES = ("reward/mean", "train/loss")
WIDTH, HEIGHT = 64, 6
QUIET_S = 30.0
"""Between the lines of a progress that is not on a terminal."""


class Display(Logger):
    """A logger for people: `Display(steps=60)`. Close it to leave the terminal as it was."""

    name = "console"

    def __init__(self, *, steps: int | None = None, stream: IO[str] | None = None) -> None:
        """
        Raises:
            MissingDependencyError: on a terminal, rich is not installed.
        """
        self._pace = Pace(steps=steps)
        self.expect = self._pace.expect
        self._stream = stream or sys.stdout
        self._history: list[Mapping[str, float]] = []
        self._waiting = self._called = ""
        self._sample: Rollout | None = None
        self._hints: dict[str, str] = {}
        self._live: Any = self._open_live() if self._stream.isatty() else None
        self._area = open_area() if stream is None and self._live is None else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._history.append(dict(metrics))
        self._pace.reach(step)
        self._waiting = ""
        hints = find_hints(self._history)
        if self._live is None and self._area is None:
            numbers = "  ".join(f"{label} {number}" for label, number in shown(metrics))
            self._print(f"{step_text(self._pace)}  {numbers}  {self._pace}".rstrip())
            for name, text in hints.items():
                if name not in self._hints:
                    self._print(f"hint: {text}")
        self._hints = hints
        self._refresh()

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        """Keeps the best reply of the first group to show."""
        scored = [r for group in groups for r in group.rollouts if r.failure is None]
        self._sample = max(scored[:16], key=lambda r: r.reward, default=None)
        self._refresh()

    def introduce(self, called: str) -> None:
        """Shows what the run is called."""
        self._called = one_line(called)
        if self._live is None and self._area is None:
            self._print(f"run {self._called}")
        self._refresh()

    def waiting_for(self, what: str) -> None:
        """Shows what the loop waits for, such as `12 of 256 rollouts`; "" for nothing."""
        self._waiting = what
        self._refresh()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._area is not None:
            self._area.flush()
            self._area = None

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._picture())
        elif self._area is not None:
            self._area.show(_as_html(self._picture()))

    def _open_live(self) -> Any:
        with requiring("Display", "rl"):
            from rich import console, live
        opened = live.Live(console=console.Console(file=self._stream), refresh_per_second=8)
        opened.start()
        return opened

    def _picture(self) -> Any:
        from rich import console, progress_bar, table
        from rich.text import Text

        head = table.Table.grid(padding=(0, 2))
        name = Text(self._called, style="dim")
        pace = self._pace
        bar = progress_bar.ProgressBar(total=pace.steps, completed=pace.step, width=24)
        head.add_row(bar, Text(step_text(pace), style="bold"), str(pace), self._waiting)
        rows: list[Any] = [name, head] if self._called else [head]
        numbers = shown(self._history[-1]) if self._history else []
        if numbers:
            grid = table.Table.grid(padding=(0, 3))
            grid.add_row(*(Text(label, style="dim") for label, _ in numbers))
            grid.add_row(*(Text(number, style="bold") for _, number in numbers))
            rows.append(grid)
        rows += [Text(line, style="cyan") for line in self._curve()]
        if self._sample is not None:
            asked, said = prompt_text(self._sample.task), self._sample.text
            said = f"{_short(asked)} → {_short(said)}  ({self._sample.reward:.2f})"
            rows.append(Text(said, style="dim"))
        rows += [Text(f"▲ {text}", style="yellow") for text in self._hints.values()]
        return console.Group(*rows)

    def _curve(self) -> list[str]:
        for name in CURVES:
            values = [row[name] for row in self._history if name in row]
            if len(values) > 1:
                done = min(1.0, self._pace.step / self._pace.steps) if self._pace.steps else 1.0
                width = max(2, round(WIDTH * done))
                return [f"{name} by step", *draw_curve(values, width=width, height=HEIGHT)]
        return []


class Progress(Logger):
    """One line for a loop without a run, `words (run-...)  step 3/60  reward 0.531  1 m 8 s left`.

    On a terminal it is written over itself; elsewhere again after every half minute at most, so
    that what takes less leaves nothing.
    """

    name = "progress"

    def __init__(self, *, stream: IO[str] | None = None) -> None:
        self._pace = Pace()
        self.expect = self._pace.expect
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._area = open_area() if stream is None and not self._live else None
        self._told = time.monotonic()
        self._width = 0
        self._called = ""

    def introduce(self, called: str) -> None:
        self._called = f"{one_line(called)}  "

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._pace.reach(step)
        numbers = "  ".join(f"{label} {number}" for label, number in shown(metrics)[:2])
        line = f"{self._called}{step_text(self._pace)}  {numbers}  {self._pace}".rstrip()
        if self._area is not None:
            self._area.show(text_html(line))
        elif self._live:
            self._write(f"\r{line:<{self._width}}")
            self._width = len(line)
        elif time.monotonic() - self._told >= QUIET_S:
            self._write(f"{line}\n")
            self._told = time.monotonic()

    def close(self) -> None:
        if self._width:
            self._write("\n")
            self._width = 0
        if self._area is not None:
            self._area.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _as_html(picture: Any) -> str:
    """Of what rich draws, as it would look on a terminal of 100 columns."""
    from rich.console import Console

    console = Console(file=StringIO(), record=True, width=100, force_jupyter=False)
    console.print(picture)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def step_text(pace: Pace) -> str:
    """`step 3/60`"""
    return f"step {pace.step}" + (f"/{pace.steps}" if pace.steps else "")


def shown(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Labels and numbers of a step, as people read them: `[("reward", "0.531"), ...]`."""
    found = []
    for label, names in COLUMNS:
        value = next((metrics[name] for name in names if name in metrics), None)
        if value is not None:
            found.append((label, number_text(value)))
    return found


def one_line(text: str) -> str:
    """A text as one line without escape sequences, which would act on the terminal."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text.strip())


def _short(text: str, *, limit: int = 60) -> str:
    line = one_line(text)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
