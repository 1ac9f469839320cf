"""Writes docs/simulation.md from what was simulated, so that no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from tests.simulate.assumptions import assumptions
from tests.simulate.contention import jain
from tests.simulate.costs import UNIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tests.simulate.figures import Figures
    from tests.simulate.world import Case

PAGE = Path(__file__).parents[2] / "docs" / "simulation.md"
WIDTH = 140
KINDS = {
    "forward_backward": "the first gradient pass of a step, for its group",
    "sample": "a sample, for a worker",
    "save_checkpoint": "saving or publishing, for its group",
    "create_model": "a new run, for its group",
}
STEPS = {
    "sft": "a step of supervised training",
    "grpo": "a step of GRPO, sampling and publishing included",
    "evaluation": "an evaluation",
}
SERVER, FOLDER, JOURNAL = "the server's processor", "the shared folder", "the journal"
AFTER = {
    SERVER: "one process decodes, checks, journals and answers all. Behind it: bodies that are "
    "decoded and journaled beside that process, then projects divided among servers, each with a "
    "database and a home of its own",
    FOLDER: "weights are written twice for each publication, and read by every sampler that draws "
    "from them. Behind it: publishing the checkpoint that was just written, fewer samplers for "
    "the prompts of one version, a faster folder",
    JOURNAL: "each gradient pass is written down whole. Behind it: PostgreSQL in place of SQLite, "
    "and bodies as files beside the database",
}


def page(day: Case, found: Mapping[str, Figures], contended: Sequence[Mapping[str, float]]) -> str:
    told = found["day"]
    return "\n".join(
        [
            _head(day, told),
            "## What is assumed\n",
            _table(("", "", "from"), assumptions(day.costs)),
            _lost(told),
            _waits(told),
            _fairness(told, contended),
            _use(told),
            _walls(found),
            _mended(found),
        ]
    )


def _text(*paragraphs: str, indent: str = "") -> str:
    return "\n".join(
        fill(one, WIDTH, break_on_hyphens=False, subsequent_indent=indent) + "\n"
        for one in paragraphs
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _head(day: Case, told: Figures) -> str:
    load = day.load
    return f"# A day with {load.tenants:,} tenants, simulated\n\n" + _text(
        "Written by `python -m tests.simulate`, which depends on its seed alone. It drives the "
        "real service, scheduler, fair share, journal on SQLite, snapshots and replays, and the "
        "real pool of samplers with its router and admission, on an event loop whose clock goes "
        "on to the next timer when nothing is left to do. What is modelled is what needs GPUs and "
        "wires: how long trainer groups, samplers, the shared folder and the server's processor "
        "take, by the figures below. **Nothing of this has run on a GPU, and what follows from an "
        "assumption is no better than that.** A small day is part of every test run "
        "(`tests/simulate`).",
        f"{load.tenants:,} tenants; {day.samplers} samplers, of which {day.joining} join after a "
        f"third of the time; {day.groups} trainer groups of {day.costs.ranks} GPU each; "
        f"{load.hours:g} hours from midnight, the fullest around 15:00. {told.jobs:,} jobs came: "
        "supervised runs (40 %), GRPO with 16 samples a problem (25 %) and evaluations (35 %). "
        "Their steps and prompts follow Pareto's distribution (1.2), batches and lengths are "
        f"log-normal. They made {told.operations:,} operations, trained "
        f"{told.trained_tokens / 1e9:.1f} billion tokens and sampled "
        f"{told.sampled_tokens / 1e9:.1f} billion.",
        f"One token of the simulation stands for {UNIT:,}: arrays are smaller by that, and with "
        "them the limits and budgets that count tokens and bytes. Checkpoints are swept for, and "
        f"workers asked for a sign of life, less often. The day took {told.cpu_s / 60:.1f} "
        f"minutes of processor time, {1000 * told.cpu_s / told.operations:.1f} ms an operation, "
        "clients and modelled devices included.",
    )


def _lost(told: Figures) -> str:
    rows = [
        ("operations sent", f"{told.operations:,}"),
        ("answered", f"{told.answered:,}"),
        ("answered twice", f"{told.doubled}"),
        ("steps with another number than the client's", f"{told.wrong}"),
        ("that were refused, or failed", _failed(told)),
        ("requests that were told to come again", f"{told.refused}"),
        ("jobs that did not end", f"{told.unfinished}"),
        ("gradient passes replayed from the journal", f"{told.replayed:,}"),
        ("samples drawn again after a worker's death", f"{told.repeated_samples:,}"),
    ]
    return (
        "## Nothing lost, nothing doubled\n\n"
        + _text(
            f"{told.workers_lost} samplers were killed with what they drew, {told.groups_lost} "
            "groups lost with all of their runs. Each step of a run answers a number that follows "
            "from every batch that was applied before it, in its order; the client computes the "
            "same from what it has sent."
        )
        + "\n"
        + _table(("", ""), rows)
    )


def _failed(told: Figures) -> str:
    return ", ".join(f"{count} (`{code}`)" for code, count in told.failed.items()) or "0"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _quantiles(names: Mapping[str, str], values: Mapping[str, Sequence[float]]) -> str:
    head = ("seconds", "how many", "50 %", "90 %", "99 %", "99.9 %", "longest")
    rows = [
        (words, f"{values[name][0]:,.0f}", *map(_seconds, values[name][1:]))
        for name, words in names.items()
        if len(values.get(name, ())) > 1
    ]
    return _table(head, rows)


def _waits(told: Figures) -> str:
    waits = _quantiles(KINDS, told.waits)
    return f"## Waits\n\n{waits}\n{_quantiles(STEPS, told.steps)}"


def _fairness(told: Figures, contended: Sequence[Mapping[str, float]]) -> str:
    served = sorted(told.served)
    sizes, runs = (jain(one.values()) for one in contended)
    return "## Fairness\n\n" + _text(
        "Of the time that a tenant's operations were in the service, the part in which they did "
        f"not wait: Jain's index of it is {told.fairness:.3f} over {len(served):,} tenants (1 is "
        f"even). For one tenant in ten it was below {served[len(served) // 10]:.0%}, for the "
        f"worst {served[0]:.0%}.",
        "Where all want one group all the time, its time is what is shared. Eight tenants with "
        f"batches of 1,000, 2,000 ... 128,000 tokens: an index of {sizes:.4f}. Seven tenants with "
        f"one run, and one with 16: {runs:.4f}.",
    )


def _use(told: Figures) -> str:
    use = [
        (name, f"{one.mean:.1%}", f"{one.peak:.1%}", f"{1 / one.peak:.1f}")
        for name, one in told.use.items()
    ]
    same, again = told.same_worker
    per_operation = told.journal_bytes / told.operations
    sums = [
        (
            "into the journal",
            f"{told.journal_bytes / 1e9:.0f} GB in {told.commits:,} commits, "
            f"{per_operation / 1e3:.0f} kB an operation",
        ),
        ("written to the shared folder", f"{told.written_bytes / 1e12:.1f} TB"),
        (
            "read from it",
            f"{told.read_bytes / 1e12:.1f} TB; samplers took up adapters {told.loads:,} times",
        ),
        ("tokens of prompts that had been read before", f"{told.reused:.1%}"),
        (
            "jobs with weights and a beginning that were seen before, at the same worker",
            f"{same:,} of {again:,}",
        ),
    ]
    hours = ", ".join(map(str, range(len(told.by_hour))))
    groups, rows = (", ".join(f"{100 * h[i]:.0f}" for h in told.by_hour) for i in range(2))
    return f"""## What was used

{_table(("", "of all hours", "of the fullest", "of which so many would fit"), use)}
{_table(("", ""), sums)}
```mermaid
xychart-beta
    title "Per cent of trainer groups and of samplers' rows, by hour"
    x-axis "hour" [{hours}]
    y-axis "per cent" 0 --> 100
    line [{groups}]
    line [{rows}]
```
"""


def _walls(found: Mapping[str, Figures]) -> str:
    told = found["day"]
    ranked = sorted(AFTER, key=lambda name: -told.use[name].peak)
    walls = [
        f"{i}. **{name[0].upper() + name[1:]}**, at {1 / told.use[name].peak:.1f} times the "
        f"fullest hour of this day: {AFTER[name]}."
        for i, name in enumerate(ranked, start=1)
    ]
    grown = {name: found[name] for name in ("x1", "x2", "x4") if name in found}
    rows = {
        "operations a second": [f"{f.operations / f.lasted_s:.1f}" for f in grown.values()],
        **{name: [f"{f.use[name].peak:.0%}" for f in grown.values()] for name in ranked},
        "a gradient pass waits, 90 % and 99 %": [
            _pair(f, "forward_backward") for f in grown.values()
        ],
        "publishing waits, 90 % and 99 %": [_pair(f, "save_checkpoint") for f in grown.values()],
        "a step of GRPO, half of them": [f"{f.steps['grpo'][1]:.0f} s" for f in grown.values()],
    }
    head = ("", *(f"{name[1:]} times" for name in grown))
    return f"""## The walls

GPUs are bought; what does not grow with them ends the growth, in this order:

{_text(*walls, indent="   ")}
An hour from 14:00 that begins with nothing in it, with as many times the tenants, groups and
samplers at the same server and folder:

{_table(head, [(words, *values) for words, values in rows.items()])}"""


def _pair(told: Figures, kind: str) -> str:
    return " and ".join(f"{_seconds(value)} s" for value in told.waits[kind][2:4])


def _mended(found: Mapping[str, Figures]) -> str:
    rows = [
        (KINDS[kind], _pair(found["hashed"], kind), _pair(found["x1"], kind))
        for kind in ("forward_backward", "save_checkpoint")
    ]
    head = ("waits, 90 % and 99 %", "by a hash", "the fewest runs")
    return f"""## What it has found

{
        _text(
            "Projects had turns, each of them one operation, however long. Of a group that eight "
            "tenants want all the time, the one with batches of 128,000 tokens had 128 times as "
            "many trained as the one with 1,000: an index of 0.37. Now its time is shared.",
            "A hash of its id gave each run to one of the groups for its model: some were full "
            "while others had nothing, and every new run was made behind the passes of the first "
            "group, whichever it was for. Now a new run goes to the group with the fewest, and "
            "waits for that one alone. That hour from 14:00:",
        )
    }
{_table(head, rows)}
{
        _text(
            "A sampler with one job had more than 1.25 times the mean load of a pool with little "
            "to do, so that the next prompt with the same beginning went elsewhere and its adapter "
            "was read once more. Now up to 16 rows are no load.",
            "Left as they are: each sweep reads the manifests of all checkpoints, once a minute; "
            "and a job with many samples at the head of the samplers' queue holds up smaller ones "
            "behind it until a worker has room for all of it.",
        )
    }"""
