"""The console: pages at `/` and `/docs`, and the read-only routes that they need; an adapter.

The pages say nothing of anybody's work and need no build: `static/` is served as it lies there.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from weaver import errors, types
from weaver.engine.status import EngineStatus
from weaver.server.activity import OperationInfo
from weaver.server.console import archives, overview
from weaver.server.http.errors import REFUSALS
from weaver.server.http.gateway import Adapter, GatewayDep, ServiceDep
from weaver.server.machine import MachineLoad

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from starlette.types import Scope

    from weaver.server.keys import Caller
    from weaver.server.records import Answer
    from weaver.server.sessions import Ticket

POINTS = 400
"""A curve has at most so many: more than a chart has pixels to tell apart."""
PENDING = 100
"""Operations that a page lists."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = APIRouter(prefix="/v1", responses=REFUSALS)


class CallerInfo(types.Value):
    project: str
    admin: bool


class RunOperations(types.Value):
    pending: tuple[OperationInfo, ...]
    """At most 100, what runs first."""
    num_pending: int
    ended: tuple[OperationInfo, ...]
    """The last 30 since the server started, the newest first."""


class Curve(types.Value):
    name: str
    source: str
    """`logged` by the client, or the kind of operation that answered it."""
    points: tuple[tuple[float, float], ...]
    """Step and value, both finite."""
    last: float
    total: int
    """How many points there were before thinning."""


class TenantLoad(types.Value):
    project: str
    runs: int = 0
    active_runs: int = 0
    """Those with an operation that waits or runs."""
    waiting: int = 0
    running: int = 0
    longest_wait_s: float = 0.0
    """The longest that one of its operations which wait now has waited."""
    stored_bytes: int = 0
    """What its checkpoints take."""


class ServerLoad(types.Value):
    at: float
    """Seconds since 1970, by the server's clock."""
    waiting: int
    running: int
    longest_wait_s: float
    """The longest that an operation which waits now has waited."""
    trained_tokens: int
    """Since the server started, as are the next."""
    sampled_tokens: int
    prompt_tokens: int
    """Of samples."""
    reused_prompt_tokens: int
    """Those of them that were not read, as others had."""
    tenants: tuple[TenantLoad, ...]
    machine: MachineLoad


class LaneLoad(types.Value):
    lane: str
    """The trainer group that computes them; empty: the server's own process."""
    runs: int = 0
    """Those with an operation that waits or runs."""
    waiting: int = 0
    running: int = 0
    longest_wait_s: float = 0.0


class ClusterLoad(EngineStatus):
    at: float
    """Seconds since 1970, by the server's clock."""
    lanes: tuple[LaneLoad, ...]
    """What operations of runs wait for: each lane that has any."""


class Pages(StaticFiles):
    """Files with the headers that let a page run nothing but its own scripts."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


PAGES = Pages(directory=Path(__file__).parent / "static")
PAGE_FILES = {"/": "index.html", "/docs": "docs.html"}
"""By the path at which they are."""


async def get_page(request: Request) -> Response:
    return await PAGES.get_response(PAGE_FILES[request.scope["route"].path], request.scope)


@router.get("/caller")
async def get_caller(request: Request) -> CallerInfo:
    caller = request.state.caller
    return CallerInfo(project=caller.project, admin=caller.admin)


@router.get("/runs/{run_id}/operations")
async def list_operations(run_id: str, gateway: GatewayDep, service: ServiceDep) -> RunOperations:
    await service.get_run(run_id)  # also refuses another project's
    pending = gateway.service.parts.activity.pending_of(run_id)
    return RunOperations(
        pending=tuple(pending[:PENDING]),
        num_pending=len(pending),
        ended=tuple(reversed(gateway.service.parts.activity.ended_of(run_id))),
    )


@router.get("/runs/{run_id}/curves")
async def read_curves(
    run_id: str,
    gateway: GatewayDep,
    service: ServiceDep,
    points: Annotated[int, Query(ge=2, le=10_000)] = POINTS,
) -> list[Curve]:
    """What the client logged, and what the run's operations answered."""
    logged = await service.read_metrics(run_id)
    answers = await gateway.service.parts.store.answers(run_id)
    return await to_thread.run_sync(lambda: curves_of(logged, answers, most=points))


@router.get("/load")
async def get_load(request: Request, gateway: GatewayDep) -> ServerLoad:
    """The load of the whole server, by project: for administrators, who see all projects."""
    admin = _administrator(request)
    activity, owners = gateway.service.parts.activity, gateway.service.parts.registry.owners
    keys = [] if gateway.keys is None else await to_thread.run_sync(gateway.keys.list)
    projects = {admin.project, *owners.values(), *(k.project for k in keys if not k.revoked_at)}
    loads: defaultdict[str, Counter[str]] = defaultdict(Counter, {p: Counter() for p in projects})
    waits: defaultdict[str, float] = defaultdict(float)
    for run in await gateway.service.list_runs():
        loads[run.project].update(runs=1, active_runs=run.status == "active")
    for checkpoint in await gateway.service.list_checkpoints():
        loads[owners.get(checkpoint.run_id, "")].update(stored_bytes=checkpoint.size_bytes)
    pending = list(activity.pending())
    for ticket in pending:
        project = ticket.session.caller.project
        if ticket.began_at is None:
            waits[project] = max(waits[project], ticket.waited_s)
        loads[project]["waiting" if ticket.began_at is None else "running"] += 1
    counts = gateway.service.parts.engine.counts
    return ServerLoad(
        at=time.time(),
        waiting=sum(load["waiting"] for load in loads.values()),
        running=sum(load["running"] for load in loads.values()),
        longest_wait_s=max(waits.values(), default=0.0),
        trained_tokens=activity.trained_tokens,
        sampled_tokens=activity.sampled_tokens,
        prompt_tokens=counts.get("prompt_tokens", 0),
        reused_prompt_tokens=counts.get("reused_prompt_tokens", 0),
        tenants=tuple(
            TenantLoad(
                project=project or "(nobody)", longest_wait_s=waits[project], **loads[project]
            )
            for project in sorted(loads)
        ),
        machine=await gateway.machine.load(gateway.service.parts.engine),
    )


@router.get("/cluster")
async def get_cluster(request: Request, gateway: GatewayDep) -> ClusterLoad:
    """Groups, ranks, samplers, and what waits for what: for administrators.

    All is empty on a server of one process.
    """
    _administrator(request)
    parts = gateway.service.parts
    lanes: dict[str, list[Ticket]] = {}
    for ticket in parts.activity.pending():
        run = parts.registry.runs.get(ticket.submission.run_id or "")
        if run is not None:
            lane = parts.engine.lane(run.run_id, run.model.name)
            lanes.setdefault(lane, []).append(ticket)
    return ClusterLoad(
        at=time.time(),
        lanes=tuple(_lane_load(lane, lanes[lane]) for lane in sorted(lanes)),
        **dict(parts.engine.status),
    )


def _lane_load(lane: str, pending: Sequence[Ticket]) -> LaneLoad:
    waits = [ticket.waited_s for ticket in pending if ticket.began_at is None]
    return LaneLoad(
        lane=lane,
        runs=len({ticket.submission.run_id for ticket in pending}),
        waiting=len(waits),
        running=len(pending) - len(waits),
        longest_wait_s=max(waits, default=0.0),
    )


def _administrator(request: Request) -> Caller:
    """Raises PermissionDeniedError."""
    caller: Caller = request.state.caller
    if not caller.admin:
        raise errors.PermissionDeniedError("the load of the server needs an administrator's key.")
    return caller


# --- curves -------------------------------------------------------------------------------------


def curves_of(
    points: Iterable[types.MetricPoint], answers: Iterable[Answer], *, most: int
) -> list[Curve]:
    """One for each name and source, of at most `most` points."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in points:
        place = found.setdefault(("logged", point.name), [])
        place.append((len(place) if point.step is None else point.step, point.value))
    for one in answers:
        step = one.step + (one.kind == "forward_backward")  # the step that its gradient goes into
        for name, value in one.metrics.items():
            if name != "step":
                found.setdefault((one.kind, name), []).append((step, value))
    return [
        Curve(
            name=name,
            source=source,
            points=tuple(thin(kept, most)),
            last=kept[-1][1],
            total=len(kept),
        )
        for (source, name), all_points in found.items()
        if (kept := [(step, value) for step, value in all_points if math.isfinite(value)])
    ]


def thin(points: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """At most `most` of the points: the lowest and the highest of each stretch, in their order."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    shown: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        shown += [points[i] for i in sorted(ends)]
    return shown


CONSOLE = Adapter(
    routes=[
        *(Route(path, get_page) for path in PAGE_FILES),
        *archives.router.routes,
        Mount("/console", PAGES),
        *router.routes,
        *overview.router.routes,
    ],
    prefix="",
    open_paths=tuple(PAGE_FILES),
    open_below=("/console/",),
)
