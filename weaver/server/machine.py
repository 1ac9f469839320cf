"""`Machine`: a server's versions, device, memory and disk, for `GET /v1/server` and `/v1/load`."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from weaver import machine, wire
from weaver.exchange import ServerInfo

if TYPE_CHECKING:
    from weaver.engine.base import Engine

COUNT_S = 60.0
"""A home is walked through so often at most: a large one takes a second."""


class MachineLoad(ServerInfo):
    uptime_s: float
    process_bytes: int | None
    """Main memory of the server's own process; None where the system does not tell."""
    home_bytes: int
    """What the home takes, counted once a minute; a database elsewhere is not in it."""


class Machine:
    """Of one server, from its start on."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._began = time.monotonic()
        self._counted_at = -COUNT_S
        self._home_bytes = 0
        self._counting = anyio.Lock()

    def about(self, engine: Engine) -> ServerInfo:
        """Blocks for as long as the disk takes to answer."""
        total, free = machine.disk_bytes(self._home)
        gauges = engine.gauges
        return ServerInfo(
            version=_version("weaver-post-training") or "",
            python=platform.python_version(),
            platform=platform.platform(),
            torch=_version("torch"),
            protocol=wire.MAGIC[3],
            device=engine.description,
            device_bytes=_whole(gauges.get("device_bytes")),
            device_free_bytes=_whole(gauges.get("device_free_bytes")),
            memory_bytes=machine.memory_bytes(),
            memory_free_bytes=machine.free_memory_bytes(),
            disk_bytes=total,
            disk_free_bytes=free,
        )

    async def load(self, engine: Engine) -> MachineLoad:
        async with self._counting:
            if time.monotonic() - self._counted_at >= COUNT_S:
                self._home_bytes = await to_thread.run_sync(size_bytes, self._home)
                self._counted_at = time.monotonic()
        about = await to_thread.run_sync(self.about, engine)
        return MachineLoad(
            **dict(about),
            uptime_s=time.monotonic() - self._began,
            process_bytes=_process_bytes(),
            home_bytes=self._home_bytes,
        )


def size_bytes(folder: Path) -> int:
    """Of all files below it, each once; those that go meanwhile count nothing."""
    sizes: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:
                continue
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _process_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # another system than Linux
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
