"""`Machine`: what a server has of its machine: memory, device, disk; for `GET /v1/load`."""

from __future__ import annotations

import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from weaver import types

if TYPE_CHECKING:
    from weaver.engine.base import Engine

COUNT_S = 60.0
"""A home is walked through so often at most: a large one takes a second."""


class MachineLoad(types.Value):
    version: str
    """Of Weaver, on the server."""
    uptime_s: float
    engine: str
    """What computes, in words: library, device, dtype, threads."""
    process_bytes: int | None
    """Main memory of the server's own process; None where the system does not tell, as the next."""
    memory_bytes: int | None
    """Main memory of the machine."""
    memory_free_bytes: int | None
    """What processes could have of it."""
    device_bytes: int | None
    """Memory of the accelerator; None on a CPU, as the next."""
    device_used_bytes: int | None
    """By whichever process."""
    disk_bytes: int
    """Of the disk with the server's home."""
    disk_free_bytes: int
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

    async def load(self, engine: Engine) -> MachineLoad:
        async with self._counting:
            if time.monotonic() - self._counted_at >= COUNT_S:
                self._home_bytes = await to_thread.run_sync(size_bytes, self._home)
                self._counted_at = time.monotonic()
        disk, gauges = shutil.disk_usage(self._home), engine.gauges
        whole, free = _memory_bytes()
        return MachineLoad(
            version=version("weaver-post-training"),
            uptime_s=time.monotonic() - self._began,
            engine=engine.description,
            process_bytes=_process_bytes(),
            memory_bytes=whole,
            memory_free_bytes=free,
            device_bytes=_whole(gauges.get("device_bytes")),
            device_used_bytes=_whole(gauges.get("device_used_bytes")),
            disk_bytes=disk.total,
            disk_free_bytes=disk.free,
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


def _memory_bytes() -> tuple[int | None, int | None]:
    """All of the machine's, and what is free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    fields = {name: 1024 * int(rest.split()[0]) for name, rest in (x.split(":") for x in lines)}
    return fields.get("MemTotal"), fields.get("MemAvailable")
