"""How busy the server is and who keeps it so: what its console tells administrators."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from anyio import to_thread

from weaver.server.scoped import ScopedService
from weaver.types import Value

if TYPE_CHECKING:
    from weaver.server.http.front import Front
    from weaver.server.tenancy import Caller


class TenantLoad(Value):
    project: str
    runs: int
    active_runs: int
    """Those with an operation that waits or runs."""
    waiting: int
    running: int
    stored_bytes: int
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
    service = ScopedService(front.service, admin)
    activity, owners = front.service.activity, front.service.owners
    keys = [] if front.keys is None else await to_thread.run_sync(front.keys.list)
    projects = {admin.project, *owners.values(), *(k.project for k in keys if not k.revoked_at)}
    runs, active, waiting, running, stored = (Counter[str]() for _ in range(5))
    for run in await service.list_runs():
        project = run.project
        runs[project] += 1
        active[project] += run.status == "active"
    for checkpoint in await service.list_checkpoints():
        stored[owners.get(checkpoint.run_id, "")] += checkpoint.size_bytes
    longest = 0.0
    for ticket in activity.pending():
        project = ticket.session.caller.project
        if ticket.began_at is None:
            waiting[project] += 1
            longest = max(longest, ticket.waited_s)
        else:
            running[project] += 1
    projects |= {project for counted in (runs, waiting, running, stored) for project in counted}
    return ServerLoad(
        at=time.time(),
        waiting=waiting.total(),
        running=running.total(),
        longest_wait_s=longest,
        trained_tokens=activity.trained_tokens,
        sampled_tokens=activity.sampled_tokens,
        tenants=tuple(
            TenantLoad(
                project=project or "(nobody)",
                runs=runs[project],
                active_runs=active[project],
                waiting=waiting[project],
                running=running[project],
                stored_bytes=stored[project],
            )
            for project in sorted(projects)
        ),
    )
