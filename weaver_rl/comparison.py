"""Runs side by side: a table of their main values, and one page of their curves over each other.

`rl.compare`, `weaver-rl compare` and sweeps call it. It reads what run folders hold and changes
nothing. The first run is what the others are compared with. A folder that holds no run, or none
that can be read, is left out by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import reduce
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import Any

from weaver.curves import number_text
from weaver.errors import ConfigError, NotFoundError, WeaverError, nearest
from weaver_rl.display import one_line
from weaver_rl.report import MAX_POINTS, make_page, thinned
from weaver_rl.run_folder import RunFolder, read_config
from weaver_rl.storage import flattened, read_lines, write_atomically
from weaver_rl.trackers import BEST

__all__ = ["Comparison", "compare"]

MAIN = (
    "reward/mean",
    "reward/pass_rate",
    "eval/mean",
    "eval/accuracy",
    "eval/loss",
    "train/accuracy",
    "train/loss",
    "policy/surprise",
    "kl/reference",
    "kl/teacher",
    "tokens/mean",
    "time/step_s",
)
"""What is compared unless metrics are named, as far as a run has it."""
WIDTH, NAME = 80, 28
"""Columns of the table, and of a run's name in it."""
POINTS = 4000
"""Of a metric's curves in a page, over all runs."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """What a folder holds."""

    label: str
    """The folder's name, with those above it as far as names are equal."""
    folder: Path
    config: Mapping[str, str] = field(repr=False)
    rows: Sequence[Row] = field(repr=False)
    """Of `metrics.jsonl`, each with its `step`."""

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Step and value, where there is a finite one."""
        return [(row["step"], row[metric]) for row in self.rows if is_number(row.get(metric))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A metric of a run."""

    run: str
    last: float
    best: float | None
    """None for a metric of which neither more nor less is better."""
    best_step: int | None
    mean_of_last: float
    """Of the last `window` values."""
    difference: float | None
    """Of `mean_of_last` from the first run's; None for itself, and where that has no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`print(rl.compare(["runs/a", "runs/b"]))` shows its table."""

    runs: tuple[LoadedRun, ...]
    values: Mapping[str, tuple[Values, ...]]
    """By metric: of each run that has it."""
    config: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Fields that differ: the runs of each value; "–" is of those without the field."""
    left_out: Mapping[str, str]
    """Folders, and why."""
    window: int

    def __str__(self) -> str:
        lines = [*self._value_lines(), *self._config_lines(), *self._left_lines()]
        return "\n".join(line.rstrip() for line in lines)

    def as_json(self) -> dict[str, Any]:
        """Everything but the curves, in the types of JSON."""
        return {
            "runs": [
                {"run": one.label, "folder": str(one.folder), "last_step": one.rows[-1]["step"]}
                for one in self.runs
            ],
            "window": self.window,
            "metrics": {name: [asdict(one) for one in rows] for name, rows in self.values.items()},
            "config": {name: dict(values) for name, values in self.config.items()},
            "left_out": dict(self.left_out),
        }

    def write_page(self, path: Path) -> Path:
        """Writes one page that needs no network: values, curves of every metric, differences.

        Raises:
            StorageError: disk full or not writable.
        """
        most = min(MAX_POINTS, max(100, POINTS // len(self.runs)))
        data = {
            "subtitle": f"{len(self.runs)} runs, compared with {self.runs[0].label}",
            "runs": [_curves(one, most) for one in self.runs],
            "window": self.window,
            "values": [[name, [asdict(one) for one in rows]] for name, rows in self.values.items()],
            "config": [[name, list(values.items())] for name, values in self.config.items()],
            "left_out": list(self.left_out.items()),
            "footer": f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. "
            f"A curve shows at most {most} steps of a run.",
        }
        page = make_page("compare", title="Comparison", data=data, scripts=("curves",))
        write_atomically(path, page.encode())
        return path

    def _value_lines(self) -> list[str]:
        lines = []
        for name, rows in self.values.items():
            head = f"{'last':>9} {'best':>9} {'at step':>8} {f'mean of {self.window}':>10}"
            lines.append(f"{short(name, NAME):<{NAME}}{head} {'difference':>11}")
            for one in rows:
                best = "–" if one.best is None else number_text(one.best)
                at = "" if one.best_step is None else one.best_step
                change = "" if one.difference is None else _signed(one.difference)
                lines.append(
                    f"  {short(one.run, NAME - 2):<{NAME - 2}}{number_text(one.last):>9} {best:>9} "
                    f"{at:>8} {number_text(one.mean_of_last):>10} {change:>11}"
                )
            lines.append("")
        return lines

    def _config_lines(self) -> list[str]:
        if len(self.runs) < 2:
            return []
        if not self.config:
            return ["The configurations are the same."]
        lines = ["What differs in the configuration"]
        for name, values in self.config.items():
            lines.append(f"  {short(name, WIDTH - 2)}")
            for value, runs in values.items():
                said = f"{short(value, 40)}: {', '.join(map(one_line, runs))}"
                lines += wrap(said, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6)
        return lines

    def _left_lines(self) -> list[str]:
        return [f"Left out: {one_line(name)}: {why}" for name, why in self.left_out.items()]


def compare(
    folders: Sequence[str | Path], *, metrics: Sequence[str] = (), window: int = 10
) -> Comparison:
    """The runs in these folders side by side; the first is what others are compared with.

    Args:
        metrics: those to compare; none: the main ones that a run has.
        window: so many last values are averaged.

    Raises:
        NotFoundError: no folder holds a run with a step; says of each why.
        ConfigError: no run has a metric of that name, or a window below 1.
    """
    if window < 1:
        raise ConfigError(f"is {window}.", field="window", hint="At least 1.")
    loaded, left_out = [], {}
    paths = list({Path(one).resolve(): Path(one) for one in folders}.values())
    labels = distinct_labels(paths)
    for path in paths:
        try:
            loaded.append(load(path, label=labels[path]))
        except WeaverError as error:
            left_out[str(path)] = str(error)
    if not loaded:
        why = " ".join(left_out.values()) or "none is given."
        raise NotFoundError(f"there is nothing to compare: {why}", field="folders")
    known = {name for run in loaded for row in run.rows for name in row} - {"step", "time"}
    for name in metrics:
        if name not in known:
            raise ConfigError(f"no run has {name!r}.", field="metrics", hint=nearest(name, known))
    values = {name: _values(loaded, name, window) for name in metrics or MAIN}
    return Comparison(
        runs=tuple(loaded),
        values={name: rows for name, rows in values.items() if rows},
        config=config_differences(loaded),
        left_out=left_out,
        window=window,
    )


def load(path: Path, *, label: str) -> LoadedRun:
    """
    Raises:
        NotFoundError, ConfigError: no folder of a run, nothing logged yet, or damaged; says which.
    """
    folder = RunFolder(path)
    try:
        if not folder.config.is_file():
            missing = "it has no config.json" if path.is_dir() else "there is no such folder"
            raise NotFoundError(f"{path} holds no run: {missing}.", field="folders")
        config, rows = read_config(folder), read_lines(folder.metrics)
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}.", field="folders") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder.config} is not of a run: it is no object.", field="folders")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ConfigError(
                f"{folder.metrics} is not of a run: entry {number} has no step.", field="folders"
            )
    if not rows:
        raise NotFoundError(f"{path} has logged no step yet.", field="folders")
    return LoadedRun(label=label, folder=path, config=dict(flattened(config)), rows=rows)


def distinct_labels(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that tell them apart: `{Path("runs/a"): "a"}`."""
    whole = [path.resolve().parts for path in paths]
    count = 1
    while len({parts[-count:] for parts in whole}) < len(whole):
        count += 1
    return {path: str(Path(*parts[-count:])) for path, parts in zip(paths, whole, strict=True)}


def config_differences(runs: Sequence[LoadedRun]) -> dict[str, dict[str, tuple[str, ...]]]:
    """By field that is not the same in all: the runs of each value, in their order."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in names:
        values: dict[str, tuple[str, ...]] = {}
        for run in runs:
            value = run.config.get(name, "–")
            values[value] = (*values.get(value, ()), run.label)
        if len(values) > 1:
            found[name] = values
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(text: str, limit: int) -> str:
    """On one line, with its middle left out where it is longer."""
    line = one_line(text)
    if len(line) <= limit:
        return line
    head = (limit - 1) // 2
    return f"{line[:head]}…{line[head + 1 - limit :]}"


def _values(runs: Sequence[LoadedRun], metric: str, window: int) -> tuple[Values, ...]:
    better = BEST.get(metric)
    found: list[Values] = []
    base: float | None = None
    for run in runs:
        points = run.points(metric)
        mean = fmean(value for _, value in points[-window:]) if points else None
        if run is runs[0]:
            base = mean
        if mean is None:
            continue
        best = reduce(better, (value for _, value in points)) if better else None
        found.append(
            Values(
                run=run.label,
                last=points[-1][1],
                best=best,
                best_step=next((step for step, value in points if value == best), None),
                mean_of_last=mean,
                difference=None if base is None or run is runs[0] else mean - base,
            )
        )
    return tuple(found)


def _curves(run: LoadedRun, most: int) -> Row:
    rows = thinned(run.rows, most)
    names = sorted({name for row in run.rows for name in row} - {"step", "time"})
    return {
        "label": run.label,
        "folder": str(run.folder),
        "steps": [row["step"] for row in rows],
        "metrics": {
            name: [float(f"{row[name]:.6g}") if is_number(row.get(name)) else None for row in rows]
            for name in names
        },
    }


def _signed(value: float) -> str:
    text = number_text(value)
    return text if value < 0 else f"+{text}"
