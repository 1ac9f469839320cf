"""What this machine has and has left, without torch: memory and disks.

The engine on a CPU asks it, a server of itself, and `weaver doctor`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int | None:
    """Of this machine, or its container; None where not told.

    Copies of files that can be read again are free.
    """
    known = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = int(parts["active_file"]) + int(parts["inactive_file"])
        known.append(limit - used + files)
    except (OSError, ValueError, KeyError):  # another system, or a container without a limit
        pass
    return min(known, default=None)


def memory_bytes() -> int | None:
    """All that there is, for this machine or its container; None where not told."""
    known = []
    try:
        known += [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        known.append(int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError, AttributeError):  # no container, or no limit: "max"
        pass
    return min(known, default=None)


def disk_bytes(folder: Path) -> tuple[int, int]:
    """All and free ones of the disk below a folder, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free
