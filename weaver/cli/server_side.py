"""The server's side of `weaver doctor`: its versions beside ours, its device, memory and disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver import machine
from weaver.errors import NotFoundError, ServiceConnectionError, StorageError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weaver.config import Settings
    from weaver.exchange import ServerInfo

WEAVER = "weaver-post-training"
LITTLE_BYTES = 10**9
"""Of a disk: with less, saving a model of some size fails."""


def ask_server(settings: Settings) -> ServerInfo:
    """
    Raises:
        ServiceConnectionError: it is out of reach, or too old to tell.
        AuthenticationError: it does not know the key.
    """
    import anyio

    from weaver.client.http import FIRST_CONTACT_S, HttpService

    async def ask() -> ServerInfo:
        address, key = settings.base_url or "", settings.api_key
        async with HttpService(address, api_key=key, outage_s=FIRST_CONTACT_S) as service:
            try:
                return await service.about()
            except NotFoundError:
                raise ServiceConnectionError(
                    "it does not tell its version: it is older than this client.",
                    hint=f'Run there: pip install --upgrade "{WEAVER}[server,engine]"',
                ) from None

    return anyio.run(ask)


def told(server: ServerInfo) -> Iterator[tuple[str, str]]:
    """Names and states, as `weaver doctor` prints them."""
    torch = f", torch {server.torch}" if server.torch else ""
    yield "server", f"weaver {server.version}, protocol {server.protocol}"
    yield "its python", f"{server.python} on {server.platform}{torch}"
    free = server.device_free_bytes
    yield "its device", server.device + (f", {room_text(free, None)}" if free is not None else "")
    yield "its memory", room_text(server.memory_free_bytes, server.memory_bytes)
    yield "its disk", room_text(server.disk_free_bytes, server.disk_bytes)


def compare(server: ServerInfo, *, version: str | None, protocol: int) -> str:
    """How the versions of both sides go together.

    Raises:
        UnsupportedError: they speak different protocols.
    """
    alike = f'pip install "{WEAVER}=={server.version}"'
    if server.protocol != protocol:
        raise UnsupportedError(
            f"the server speaks protocol {server.protocol}, this client {protocol}.",
            hint=f"Run here: {alike}",
        )
    if version in (None, server.version):
        return "go together"
    return f"go together, {version} here and {server.version} there; to be alike: {alike}"


def check_disk(free_bytes: int, *, what: str) -> None:
    """Raises StorageError: there is little left."""
    if free_bytes < LITTLE_BYTES:
        raise StorageError(
            f"{what} has {free_bytes / 1e6:.0f} MB left.",
            hint="Delete checkpoints: weaver checkpoints delete --older-than 30d --dry-run",
        )


def own_disk(home: Path) -> tuple[int, str]:
    """Free bytes of the disk below a home, and how that is told."""
    total, free = machine.disk_bytes(home)
    return free, room_text(free, total)


def room_text(free: int | None, total: int | None) -> str:
    """`3.1 of 8.0 GB free`"""
    if free is None:
        return "not known"
    return f"{free / 1e9:.1f}{'' if total is None else f' of {total / 1e9:.1f}'} GB free"
