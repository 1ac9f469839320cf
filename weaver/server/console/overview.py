"""`GET /v1/overview`: the runs as a list shows them, with what tells how each learns and how fast.

Asked by the console every few seconds, also where there are a thousand runs: a page of them, and no
run's whole history.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query, Request

from weaver import types
from weaver.curves import TELLING
from weaver.server import tables
from weaver.server.http.errors import REFUSALS
from weaver.server.http.gateway import GatewayDep
from weaver.server.registry import Access

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.server.activity import OperationInfo
    from weaver.server.journal import Journal
    from weaver.server.runs import Run

RATE_S = 60.0
"""Tokens are counted over the last operations of a run, as far back as this."""
router = APIRouter(prefix="/v1", responses=REFUSALS)


class Telling(types.Value):
    name: str
    value: float


class RunLine(types.Value):
    run_id: str
    name: str | None
    project: str
    base_model: str
    step: int
    status: Literal["active", "idle", "stopped"]
    created_at: datetime
    last_request_at: datetime
    telling: Telling | None
    """Its last reward or loss, if it has one among the last 128 numbers that it logged."""
    tokens_per_s: float | None
    """Trained and sampled, over its last minute of work; None: none since the server started."""


class Overview(types.Value):
    runs: tuple[RunLine, ...]
    """That which was heard of last comes first."""
    total: int
    """How many there are of those that are asked for."""


@router.get("/overview")
async def get_overview(
    request: Request,
    gateway: GatewayDep,
    find: Annotated[str, Query(max_length=1024)] = "",
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Overview:
    """Runs that the caller may see; `find` leaves those that have each of its words in their name,
    id, base model or project."""
    parts = gateway.service.parts
    access, words = Access(request.state.caller, parts.registry), find.lower().split()
    found = [
        run
        for run in parts.registry.runs.values()
        if access.has_run(run.run_id) and all(word in _text(run) for word in words)
    ]
    found.sort(key=lambda run: run.last_request_at, reverse=True)
    shown = found[offset : offset + limit]
    sampled = parts.executor.sampled_runs()
    numbers = await _numbers(parts.store, [run.run_id for run in shown])
    lines = [
        RunLine(
            run_id=run.run_id,
            name=run.name,
            project=run.project,
            base_model=run.model.name,
            step=run.step,
            status=run.describe(sampled=run.run_id in sampled).status,
            created_at=run.created_at,
            last_request_at=run.last_request_at,
            telling=_telling(numbers.get(run.run_id, {})),
            tokens_per_s=tokens_per_s(parts.activity.ended_of(run.run_id)),
        )
        for run in shown
    ]
    return Overview(runs=tuple(lines), total=len(found))


def _text(run: Run) -> str:
    return f"{run.run_id} {run.name or ''} {run.model.name} {run.project}".lower()


async def _numbers(store: Journal, run_ids: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """By run, the last value of each telling name among its newest: logged, or else answered."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    answered = tables.answers.c.kind == "forward_backward"
    for row in await store.writer.read(tables.newest(tables.answers, run_ids, answered, by="kind")):
        found[row.run_id] |= {name: row.metrics[name] for name in TELLING if name in row.metrics}
    named = tables.metrics.c.name.in_(TELLING)
    for row in await store.writer.read(tables.newest(tables.metrics, run_ids, named, by="name")):
        found[row.run_id][row.name] = row.value
    return found


def _telling(numbers: Mapping[str, float]) -> Telling | None:
    name = next((name for name in TELLING if name in numbers), None)
    return None if name is None else Telling(name=name, value=numbers[name])


def tokens_per_s(ended: Sequence[OperationInfo]) -> float | None:
    """Of operations in the order in which they ended."""
    spans = []
    for one in ended:
        begin = one.submitted_at.timestamp() + one.waited_s
        tokens = one.metrics.get("num_tokens", one.metrics.get("tokens", 0.0))
        if tokens:
            spans.append((begin, begin + one.ran_s, tokens))
    if not spans:
        return None
    last = max(end for _, end, _ in spans)
    late = [span for span in spans if span[1] >= last - RATE_S]
    took_s = last - min(begin for begin, _, _ in late)
    return sum(tokens for _, _, tokens in late) / took_s if took_s > 0 else None
