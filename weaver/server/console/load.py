"""How busy the server is and who keeps it so: what its console tells administrators."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from anyio import to_thread

from weaver.types import Value

if TYPE_CHECKING:
    from weaver.server.http.front import Front
    from weaver.server.tenancy import Caller


class TenantLoad(Value):
    project: str
    runs: int = 0
    active_runs: int = 0
    """Those with an operation that waits or runs."""
    waiting: int = 0
    running: int = 0
    stored_bytes: int = 0
    """Of its checkpoints."""


class ServerLoad(Value):
    at: float
    """Seconds since 1970, by the server's clock."""
    waiting: int
    running: int
    longest_wait_s: float
    """Of the operations that wait now."""
    trained_tokens: int
    """Since the server started, as is the next."""
    sampled_tokens: int
    tenants: tuple[TenantLoad, ...]


async def load_of(front: Front, admin: Caller) -> ServerLoad:
    """Asks as `admin`, who sees all projects."""
    activity, owners = front.service.activity, front.service.owners
    keys = [] if front.keys is None else await to_thread.run_sync(front.keys.list)
    projects = {admin.project, *owners.values(), *(k.project for k in keys if not k.revoked_at)}
    loads: defaultdict[str, Counter[str]] = defaultdict(Counter, {p: Counter() for p in projects})
    for run in await front.service.list_runs():
        loads[run.project].update(runs=1, active_runs=run.status == "active")
    for checkpoint in await front.service.list_checkpoints():
        loads[owners.get(checkpoint.run_id, "")].update(stored_bytes=checkpoint.size_bytes)
    pending = list(activity.pending())
    for ticket in pending:
        state = "waiting" if ticket.began_at is None else "running"
        loads[ticket.session.caller.project][state] += 1
    return ServerLoad(
        at=time.time(),
        waiting=sum(load["waiting"] for load in loads.values()),
        running=sum(load["running"] for load in loads.values()),
        longest_wait_s=max((t.waited_s for t in pending if t.began_at is None), default=0.0),
        trained_tokens=activity.trained_tokens,
        sampled_tokens=activity.sampled_tokens,
        tenants=tuple(
            TenantLoad(project=project or "(nobody)", **loads[project]) for project in sorted(loads)
        ),
    )
