"""`Figures`: a case's outcome in plain numbers, which go between processes and onto the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulate.contention import jain
from tests.simulate.costs import UNIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.simulate.world import Seen

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
COMMIT_S, FLUSH_S = 0.0002, 0.005
"""What SQLite takes for a commit, and for one that waits for the disk."""
DISK_BYTES_PER_S = 500e6
NUMBER_BYTES = 4
"""Of each log-probability and token in an outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How much of something was used: of all hours, and of the fullest."""

    mean: float
    peak: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    jobs: int
    sent: Mapping[str, int]
    answered: int
    doubled: int
    wrong: int
    failed: Mapping[str, int]
    refused: int
    unfinished: int
    waits: Mapping[str, Sequence[float]]
    """By kind: how many, then `QUANTILES` of seconds."""
    steps: Mapping[str, Sequence[float]]
    """Likewise, of whole steps and evaluations."""
    served: Sequence[float]
    """Of each tenant's time in the service, the part in which it did not wait."""
    use: Mapping[str, Use]
    by_hour: Sequence[tuple[float, float]]
    """Of groups and of samplers' rows."""
    trained_tokens: float
    sampled_tokens: float
    reused: float
    """Of prompts' tokens, those that had been read before."""
    journal_bytes: float
    commits: int
    written_bytes: float
    read_bytes: float
    loads: int
    workers_lost: int
    repeated_samples: int
    same_worker: tuple[int, int]
    groups_lost: int
    replayed: int
    lasted_s: float
    real_s: float
    cpu_s: float

    @property
    def fairness(self) -> float:
        return jain(self.served)

    @property
    def operations(self) -> int:
        return sum(self.sent.values())


def quantiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    if not ordered:
        return [0.0]
    return [float(len(ordered)), *(ordered[int(q * (len(ordered) - 1))] for q in QUANTILES)]


def figures_of(seen: Seen) -> Figures:
    case, drawn, groups = seen.case, seen.drawn, seen.groups
    hours = max(1, int(case.load.hours))
    trained = UNIT * seen.trained_units
    rows = case.samplers * case.costs.worker_rows
    by_group: dict[int, float] = {}
    for group in groups.groups.values():
        for hour, busy_s in group.by_hour.items():
            by_group[hour] = by_group.get(hour, 0.0) + busy_s
    journal_bytes = (
        seen.journal_bytes
        + trained * (case.costs.token_bytes + NUMBER_BYTES)
        + drawn.tokens * 3 * NUMBER_BYTES
    )
    server = _use(seen.server.by_hour, 1, hours)
    journal_s = COMMIT_S * seen.commits + FLUSH_S * seen.flushes
    journal_s += 2 * journal_bytes / DISK_BYTES_PER_S
    mean = journal_s / (3600 * hours)
    return Figures(
        jobs=seen.jobs,
        sent=seen.account.sent,
        answered=seen.account.answered,
        doubled=seen.account.doubled,
        wrong=seen.account.wrong,
        failed=seen.account.failed,
        refused=seen.account.refused,
        unfinished=seen.unfinished,
        waits={kind: quantiles(values) for kind, values in seen.waits.items()},
        steps={
            name: quantiles(getattr(seen.steps, name)) for name in ("sft", "grpo", "evaluation")
        },
        served=[1 - waited_s / whole_s for waited_s, whole_s in seen.tenants.values()],
        use={
            "trainer groups": _use(by_group, case.groups, hours),
            "rows of samplers": _use(drawn.row_s, rows, hours),
            "the server's processor": server,
            "the shared folder": _use(seen.shared.by_hour, seen.shared.count, hours),
            "the journal": Use(mean=mean, peak=mean * server.peak / server.mean),
        },
        by_hour=[
            (by_group.get(hour, 0.0) / 3600 / case.groups, drawn.row_s.get(hour, 0.0) / 3600 / rows)
            for hour in range(hours)
        ],
        trained_tokens=trained,
        sampled_tokens=drawn.tokens,
        reused=drawn.cached_tokens / drawn.prompt_tokens if drawn.prompt_tokens else 0.0,
        journal_bytes=journal_bytes,
        commits=seen.commits,
        written_bytes=seen.shared.bytes["written"],
        read_bytes=seen.shared.bytes["read"],
        loads=drawn.loads,
        workers_lost=drawn.lost,
        repeated_samples=seen.repeated_samples,
        same_worker=seen.same_worker,
        groups_lost=sum(max(0, group.starts - 1) for group in groups.groups.values()),
        replayed=groups.replayed,
        lasted_s=seen.lasted_s,
        real_s=seen.real_s,
        cpu_s=seen.cpu_s,
    )


def _use(by_hour: Mapping[int, float], count: float, hours: int) -> Use:
    each = [by_hour.get(hour, 0.0) / 3600 / count for hour in range(hours)]
    return Use(mean=sum(each) / hours, peak=max(each))
