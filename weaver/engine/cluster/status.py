"""`Status`: what the groups and samplers of a server do, in a file.

`weaver cluster status` reads it, another process, so that it tells of a server that hangs, too.
Nothing of Ray is needed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from weaver.errors import ConfigError
from weaver.values import Value

if TYPE_CHECKING:
    from weaver.engine.cluster.group import TrainerGroup
    from weaver.engine.cluster.placed_worker import PlacedWorker

FILE = "status.json"


class RankStatus(Value):
    host: str
    pid: int
    device: str
    memory_bytes: int
    """Of main memory, at its last call; 0 before."""


class GroupStatus(Value):
    name: str
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


class SamplerStatus(Value):
    name: str
    state: str
    """`stopped`, `waiting` for room, `starting`, `running`."""
    since: float
    """Seconds since 1970."""
    waits_for: str | None
    starts: int
    last_loss: str | None
    host: str | None
    pid: int
    """Of its process there; 0 before there is one."""


class Status(Value):
    host: str
    pid: int
    """Of the server."""
    at: float
    ray: str
    groups: tuple[GroupStatus, ...]
    samplers: tuple[SamplerStatus, ...] = ()


def _status_of(name: str, group: TrainerGroup) -> GroupStatus:
    ranks = group.ranks
    facts = ranks.facts if ranks else []
    memory = ranks.memory if ranks and ranks.memory else [0] * len(facts)
    return GroupStatus(
        name=name,
        mode=group.config.mode,
        ranks_wanted=group.config.ranks,
        state=group.state,
        since=group.since,
        waits_for=group.waits_for,
        starts=group.starts,
        last_loss=group.last_loss,
        runs=len(ranks.runs) if ranks else 0,
        ranks=tuple(
            RankStatus(host=of.host, pid=of.pid, device=of.device, memory_bytes=size)
            for of, size in zip(facts, memory, strict=True)
        ),
    )


def _status_of_sampler(worker: PlacedWorker) -> SamplerStatus:
    ground = worker.ground
    return SamplerStatus(
        name=worker.name,
        state=worker.state,
        since=worker.since,
        waits_for=worker.waits_for,
        starts=worker.starts,
        last_loss=worker.last_loss,
        host=ground.host if ground is not None else None,
        pid=worker.pid,
    )


def write_status(
    folder: Path,
    groups: Mapping[str, TrainerGroup],
    samplers: Sequence[PlacedWorker] = (),
    *,
    ray: str,
) -> None:
    """In the place of what was there, at once. One that cannot be written is left out."""
    told = Status(
        host=socket.gethostname(),
        pid=os.getpid(),
        at=time.time(),
        ray=ray,
        groups=tuple(_status_of(name, group) for name, group in groups.items()),
        samplers=tuple(map(_status_of_sampler, samplers)),
    )
    new = folder / f"{FILE}.{os.getpid()}"
    with suppress(OSError):
        new.write_text(told.model_dump_json(indent=2))
        new.replace(folder / FILE)


def read_status(folder: Path) -> Status:
    """
    Raises:
        ConfigError: no server with a cluster has this folder, or it has ended.
    """
    file = folder / FILE
    try:
        status = Status.model_validate_json(file.read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"there is no {file}: {getattr(error, 'strerror', None) or 'it cannot be read'}.",
            field="home",
            hint="It is there while `weaver serve --cluster` runs with this home.",
        ) from None
    if status.host == socket.gethostname() and not Path(f"/proc/{status.pid}").exists():
        raise ConfigError(
            f"the server {status.pid} that wrote {file} has ended.",
            field="home",
            hint="Start it again with `weaver serve --cluster`.",
        )
    return status


def forget_status(folder: Path) -> None:
    """Its server has ended in order."""
    with suppress(OSError):
        (folder / FILE).unlink()
