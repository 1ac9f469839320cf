"""Sweeps: a function over plans and seeds, each run in a folder, the results in one table.

A run that is finished leaves `result.json` in its folder and is not run again; one that failed is
named, the others go on, and the next sweep in the same folder takes it up.

runs/objectives/
├── results.csv, results.json   a row for each run, written anew behind each
├── comparison.html             the curves of all over each other
└── ppo-seed-0/result.json      beside what the run itself leaves
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal

from weaver.curves import number_text
from weaver.errors import ConfigError, NotFoundError
from weaver.files import hold_lock, release_lock
from weaver.threads import in_daemon_thread
from weaver_rl.algorithms.run import MAY_DIFFER
from weaver_rl.comparison import MAIN, compare, is_number, short
from weaver_rl.guard import attempt, attempt_async, is_async, task_group
from weaver_rl.pace import duration
from weaver_rl.plan import Steps
from weaver_rl.storage import encode, flattened, naming_storage, plain, write_atomically
from weaver_rl.types import Failure

__all__ = ["Sweep", "SweepRun", "sweep"]

log = logging.getLogger(__name__)
Play = Callable[[Any, Path], Any]
"""Runs a plan in a folder; answers what `train`, `fine_tune` or a loop does, or metrics."""
NAME = re.compile(r"[\w=+,-][\w.=+,-]*")
RESERVED = ("lock", "results.csv", "results.json", "comparison.html")
LONGEST = 80
"""Letters of a name that is made of what differs."""
COLUMNS, RUN = 4, 28
"""Metrics in the table, and columns of a run's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    name: str
    plan: str
    """Its name; runs that differ by their seed alone have the same."""
    seed: int
    folder: Path
    config: Mapping[str, str] = field(repr=False)
    """The plan's fields, as texts."""
    metrics: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Those of its end; {} of one that failed."""
    seconds: float = 0.0
    failure: str = ""
    """What it ended with, if not with metrics."""


@dataclass(frozen=True, slots=True, repr=False)
class Sweep:
    """What a sweep found; `print(found)` shows its table."""

    runs: tuple[SweepRun, ...]
    folder: Path

    @property
    def failed(self) -> tuple[SweepRun, ...]:
        return tuple(one for one in self.runs if one.failure)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each run, as pandas takes them: names, what differs in the plans, metrics."""
        names = sorted({name for one in self.runs for name in one.metrics})
        fields = [
            name
            for name in dict.fromkeys(name for one in self.runs for name in one.config)
            if name != "seed" and len({one.config.get(name) for one in self.runs}) > 1
        ]
        return [
            {
                "run": one.name,
                "plan": one.plan,
                "seed": one.seed,
                **{name: one.config.get(name) for name in fields},
                **{name: one.metrics.get(name) for name in names},
                "seconds": round(one.seconds, 3),
                "failure": one.failure,
            }
            for one in self.runs
        ]

    def write(self) -> None:
        """Writes `results.csv` and `results.json` into the folder.

        Raises:
            StorageError: disk full or not writable.
        """
        rows, text = self.rows(), io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.folder / "results.csv", text.getvalue().encode("utf-8", "replace"))
        write_atomically(self.folder / "results.json", encode(rows, indent=2) + b"\n")

    def __repr__(self) -> str:
        names = [n for n in MAIN if any(n in one.metrics for one in self.runs)][:COLUMNS]
        lines = [f"{'run':<{RUN}}" + "".join(f"{short(name, 12):>13}" for name in names)]
        for one in self.runs:
            values = [number_text(one.metrics[n]) if n in one.metrics else "–" for n in names]
            said = "".join(f"{value:>13}" for value in values)
            said = "  " + short(f"failed: {one.failure}", 78 - RUN) if one.failure else said
            lines.append(f"{short(one.name, RUN):<{RUN}}{said}")
        groups = {one.plan: [r for r in self.runs if r.plan == one.plan] for one in self.runs}
        if any(len(group) > 1 for group in groups.values()):
            lines += ["", f"{'mean ± deviation over seeds':<{RUN}}".rstrip()]
            lines += [_over_seeds(plan, group, names[:3]) for plan, group in groups.items()]
        return "\n".join(line.rstrip() for line in lines)


def sweep(
    play: Play,
    plans: Mapping[str, Steps] | Sequence[Steps],
    *,
    folder: str | Path,
    seeds: Sequence[int] = (),
    concurrency: int = 1,
    display: bool = True,
) -> Sweep:
    """Runs `play(plan, folder)` for each plan and seed, and waits for all.

    Args:
        play: `lambda plan, folder: rl.train(model, tasks, reward, plan=plan, folder=folder,
            resume=True, display=False)`, or an async function; it answers something with `metrics`,
            or a mapping of them. With `resume=True` a run that was interrupted goes on.
        plans: by name; or a list, named by what differs in them.
        folder: of the sweep; each run has one below it.
        seeds: each plan is run with each of these in place of its own.
        concurrency: so many at a time: tasks if `play` is async, else threads. Runs in this process
            share its cores, so more than one pays on a server.
        display: a line on standard error behind each run.

    Raises:
        ConfigError: no plans, two of a name, or a folder that holds a finished run of another
            plan; before anything is run.
        ConflictError: another process has the folder.
        StorageError: it cannot be written.
    """
    if not callable(play):
        hint = "Pass a function of a plan and a folder."
        raise ConfigError(f"is {play!r}.", field="play", hint=hint)
    if concurrency < 1:
        raise ConfigError(f"is {concurrency}.", field="concurrency", hint="At least 1.")
    place = Path(folder)
    planned = planned_runs(plans, seeds, place)
    known = {one.run.name: done for one in planned if (done := finished(one.run)) is not None}
    with naming_storage(place):
        lock = hold_lock(place, what=f"the sweep's folder {place}", hint="Choose another folder.")
    try:
        work = _Work(play, planned=planned, known=known, folder=place, display=display)
        if concurrency == 1 and not is_async(play):
            work.one_by_one()  # in this thread, which an interrupt ends
        else:
            with start_blocking_portal() as portal:
                portal.call(work.at_the_same_time, concurrency)
        with suppress(NotFoundError):  # what `play` did left no metrics.jsonl
            compare([one.folder for one in work.found.runs]).write_page(place / "comparison.html")
    finally:
        release_lock(lock)
    return work.found


@dataclass(frozen=True, slots=True)
class Planned:
    run: SweepRun
    """Without its results."""
    plan: Steps


def planned_runs(
    plans: Mapping[str, Steps] | Sequence[Steps], seeds: Sequence[int], folder: Path
) -> list[Planned]:
    """All runs of a sweep, in order; raises ConfigError, see `sweep`."""
    given = list(plans.items()) if isinstance(plans, Mapping) else list(enumerate(plans))
    if not given:
        raise ConfigError("there are none.", field="plans", hint="Give at least one.")
    for key, plan in given:
        if not isinstance(plan, Steps):
            hint = "Give rl.Plan(...), rl.SupervisedPlan(...) or rl.PreferencePlan(...)."
            raise ConfigError(f"is {plan!r}.", field=f"plans[{key!r}]", hint=hint)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"are {list(seeds)}.", field="seeds", hint="Give each once.")
    if isinstance(plans, Mapping):
        names = list(plans)
    else:
        names = names_of([config_of(replace(p, seed=0) if seeds else p) for p in plans])
    for name in names:
        if not NAME.fullmatch(name) or name in RESERVED:
            hint = "It names a folder: use letters, digits and _-+=,. in another word."
            raise ConfigError(f"has {name!r}.", field="plans", hint=hint)
    made = []
    for name, (_, plan) in zip(names, given, strict=True):
        for seed in seeds or (plan.seed,):
            one = replace(plan, seed=seed)
            label = f"{name}-seed-{seed}" if seeds else name
            config = config_of(one)
            run = SweepRun(name=label, plan=name, seed=seed, folder=folder / label, config=config)
            made.append(Planned(run, one))
    return made


def config_of(plan: Steps) -> dict[str, str]:
    return dict(flattened(plain(plan.as_config())))


def names_of(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """`["loss_fn=ppo", "loss_fn=gspo"]`: what differs; numbers where that is too long."""
    fields = [
        name
        for name in dict.fromkeys(name for config in configs for name in config)
        if len({config.get(name) for config in configs}) > 1
    ]
    for i, config in enumerate(configs):
        if config in configs[:i]:
            same = f"is the same as plans[{configs.index(config)}]."
            raise ConfigError(same, field=f"plans[{i}]", hint="Leave one out, or pass seeds=.")
    if len(configs) == 1:
        return ["plan"]
    names = [
        re.sub(r"[^\w.=+,-]+", "-", ",".join(f"{n.split('.')[-1]}={c.get(n)}" for n in fields))
        for c in configs
    ]
    unfit = len(set(names)) < len(names) or max(map(len, names)) > LONGEST
    return [f"plan-{i}" for i in range(len(names))] if unfit else names


def finished(run: SweepRun) -> SweepRun | None:
    """The results that its folder has; None where it is to be run, or to go on.

    Raises:
        ConfigError: they are of another plan; names the field.
    """
    file = run.folder / "result.json"
    try:
        content = json.loads(file.read_bytes())
        before = dict(content["plan"])
        metrics = {str(name): float(value) for name, value in content["metrics"].items()}
        done = replace(run, metrics=metrics, seconds=float(content["seconds"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s is damaged; its run is begun anew.", file)
        return None
    changed = [n for n in before.keys() | run.config.keys() if before.get(n) != run.config.get(n)]
    for name in sorted(changed):
        if name.partition(".")[0] not in MAY_DIFFER:
            raise ConfigError(
                f"{run.folder} holds a finished run with {before.get(name)!r}, "
                f"now it is {run.config.get(name)!r}.",
                field=f"plans.{name}",
                hint="Choose another folder for the sweep, or another name for the plan.",
            )
    return None if changed else done


class _Work:
    """The runs of a sweep, and what became of those that ended."""

    def __init__(
        self,
        play: Play,
        *,
        planned: Sequence[Planned],
        known: Mapping[str, SweepRun],
        folder: Path,
        display: bool,
    ) -> None:
        self._play, self._folder, self._display = play, folder, display
        self._planned = planned
        self._results = dict(known)
        self._waiting = [one for one in planned if one.run.name not in known]
        self._begin = time.monotonic()
        self.found.write()

    @property
    def found(self) -> Sweep:
        """Of the runs that have ended, in the order of the plans."""
        names = [one.run.name for one in self._planned]
        return Sweep(tuple(self._results[n] for n in names if n in self._results), self._folder)

    def one_by_one(self) -> None:
        for one in self._waiting:
            begin = time.monotonic()
            self._note(one, attempt(partial(self._play, one.plan, one.run.folder), "run"), begin)

    async def at_the_same_time(self, concurrency: int) -> None:
        limiter = anyio.CapacityLimiter(concurrency)

        async def run(one: Planned) -> None:
            call = partial(self._play, one.plan, one.run.folder)
            async with limiter:
                begin = time.monotonic()
                if is_async(self._play):
                    value = await attempt_async(call, "run")
                else:
                    value = await in_daemon_thread(partial(attempt, call, "run"))
                self._note(one, value, begin)

        async with task_group() as tasks:
            for one in self._waiting:
                tasks.start_soon(run, one)

    def _note(self, one: Planned, value: object, begin: float) -> None:
        """Keeps what a run answered, or why it did not."""
        seconds = time.monotonic() - begin
        metrics = attempt(partial(metrics_of, value), "run")
        if isinstance(value, Failure):
            log.error("The run %s failed; the others go on.\n%s", one.run.name, value.traceback)
            metrics = value
        if isinstance(metrics, Failure):
            message = metrics.message.strip()
            self._results[one.run.name] = replace(one.run, seconds=seconds, failure=message)
        else:
            self._results[one.run.name] = replace(one.run, seconds=seconds, metrics=metrics)
            kept = {"plan": one.run.config, "metrics": metrics, "seconds": seconds}
            write_atomically(one.run.folder / "result.json", encode(kept, indent=2) + b"\n")
        self.found.write()
        if self._display:
            self._say(self._results[one.run.name])

    def _say(self, run: SweepRun) -> None:
        done, waiting = len(self._results), len(self._planned) - len(self._results)
        here = len(self._waiting) - waiting
        left = duration((time.monotonic() - self._begin) / here * waiting)
        named = next((name for name in MAIN if name in run.metrics), None)
        said = "done" if named is None else f"{named} {number_text(run.metrics[named])}"
        said = short(f"failed: {run.failure}", 60) if run.failure else said
        ahead = f", {left} left" if waiting else ""
        line = f"{done}/{len(self._planned)}  {run.name}: {said}  {duration(run.seconds)}{ahead}"
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def metrics_of(value: object) -> dict[str, float]:
    """What `play` answered; raises TypeError where that is nothing with metrics."""
    found = getattr(value, "metrics", value)
    if not isinstance(found, Mapping):
        raise TypeError(
            f"the run answered a {type(value).__name__}: give back what rl.train returned, "
            "a Result or a mapping of metrics."
        )
    return {str(name): float(number) for name, number in found.items() if is_number(number)}


def _over_seeds(plan: str, runs: Sequence[SweepRun], names: Sequence[str]) -> str:
    cells = []
    for name in names:
        values = [one.metrics[name] for one in runs if name in one.metrics]
        spread = f" ± {number_text(stdev(values))}" if len(values) > 1 else ""
        cells.append(f"{number_text(fmean(values))}{spread}" if values else "–")
    return f"{short(plan, RUN):<{RUN}}" + "".join(f"{cell:>17}" for cell in cells)
