"""`Status`: what the groups and samplers of a server do, as its engine tells it and in a file.

`weaver cluster status` reads the file, another process, so that it tells of a server that hangs,
too.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from weaver.engine.status import (
    EngineStatus,
    GroupStatus,
    PoolStatus,
    RankStatus,
    SamplerStatus,
)
from weaver.errors import ConfigError

if TYPE_CHECKING:
    from weaver.engine.cluster.group import TrainerGroup
    from weaver.engine.cluster.place import Place
    from weaver.engine.cluster.placed_worker import PlacedWorker
    from weaver.engine.cluster.pool import SamplerPool

FILE = "status.json"


class Status(EngineStatus):
    host: str
    pid: int
    """Of the server."""
    at: float
    """Seconds since 1970."""


def status_of_group(group: TrainerGroup) -> GroupStatus:
    ranks = group.ranks
    facts = ranks.facts if ranks else []
    memory = ranks.memory if ranks and ranks.memory else [0] * len(facts)
    return GroupStatus(
        name=group.name,
        model=group.config.model,
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


def status_of_pool(pool: SamplerPool) -> PoolStatus:
    room = pool.room()
    return PoolStatus(
        model=pool.model.name,
        workers=room.workers,
        rows=room.rows,
        free_rows=room.free_rows,
        waiting=room.waiting,
    )


def status_of_worker(model: str, place: Place) -> SamplerStatus:
    """Of one that the server has started itself."""
    up = place.facts is not None
    return SamplerStatus(
        name=f"{model}/{place.name}",
        model=model,
        state="running" if up else "starting",
        since=place.since,
        waits_for=None,
        starts=place.starts,
        last_loss=place.last_loss,
        host=None,
        pid=0,
        rows=place.load,
        memory_bytes=place.memory_bytes,
    )


def status_of_placed(model: str, worker: PlacedWorker, place: Place | None) -> SamplerStatus:
    """Of one that Ray has placed; without its place, if its pool was not opened yet."""
    ground = worker.ground
    return SamplerStatus(
        name=worker.name,
        model=model,
        state=worker.state,
        since=worker.since,
        waits_for=worker.waits_for,
        starts=worker.starts,
        last_loss=worker.last_loss,
        host=ground.host if ground is not None else None,
        pid=worker.pid,
        rows=place.load if place is not None else 0,
        memory_bytes=place.memory_bytes if place is not None else 0,
    )


def write_status(folder: Path, status: EngineStatus) -> None:
    """In the place of what was there, at once. One that cannot be written is left out."""
    told = Status(host=socket.gethostname(), pid=os.getpid(), at=time.time(), **dict(status))
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
