"""`about`: what a server tells of itself, for `GET /v1/server`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from weaver import machine, wire
from weaver.exchange import ServerInfo

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.engine.base import Engine


def about(engine: Engine, home: Path) -> ServerInfo:
    """Blocks for as long as the disk takes to answer."""
    total, free = machine.disk_bytes(home)
    device_free = engine.gauges.get("device_free_bytes")
    return ServerInfo(
        version=_version("weaver-post-training") or "",
        python=platform.python_version(),
        platform=platform.platform(),
        torch=_version("torch"),
        protocol=wire.MAGIC[3],
        device=engine.description,
        device_free_bytes=None if device_free is None else int(device_free),
        memory_bytes=machine.memory_bytes(),
        memory_free_bytes=machine.free_memory_bytes(),
        disk_bytes=total,
        disk_free_bytes=free,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
