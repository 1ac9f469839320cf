"""`EngineStatus`: what an engine has in other processes, and what waits there for what.

Engines answer it; `weaver cluster status` and `GET /v1/cluster` show it. Nothing of Ray is needed.
"""

from __future__ import annotations

from weaver.values import Value


class RankStatus(Value):
    host: str
    pid: int
    device: str
    memory_bytes: int
    """Of main memory, at its last call; 0 before."""


class GroupStatus(Value):
    name: str
    model: str
    mode: str
    ranks_wanted: int
    state: str
    """`stopped` until a run needs it, `waiting` for room, `starting`, `ready`."""
    since: float
    """Seconds since 1970."""
    waits_for: str | None
    starts: int
    last_loss: str | None
    """Why its ranks were given up, the last time."""
    runs: int
    ranks: tuple[RankStatus, ...]


class PoolStatus(Value):
    model: str
    workers: int
    """That run."""
    rows: int
    """Samples that they draw at once."""
    free_rows: int
    waiting: int
    """Jobs that have no worker yet."""


class SamplerStatus(Value):
    name: str
    model: str
    state: str
    """`stopped`, `waiting` for room, `starting`, `running`."""
    since: float
    """Seconds since 1970."""
    waits_for: str | None
    starts: int
    last_loss: str | None
    host: str | None
    """None: of the server's machine, which has started it itself."""
    pid: int
    """Of its process there; 0 before there is one, or where the server has started it itself."""
    rows: int
    """Samples that it draws now."""
    memory_bytes: int
    """Of main memory, its engine's processes included; 0 before it was asked."""


class EngineStatus(Value):
    ray: str = ""
    """Where it is; empty without one."""
    groups: tuple[GroupStatus, ...] = ()
    pools: tuple[PoolStatus, ...] = ()
    samplers: tuple[SamplerStatus, ...] = ()
