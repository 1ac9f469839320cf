"""A client of a service on the fake engine, for the mechanics of loops."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from tests.fake_engine import FakeEngine
from weaver import AsyncServiceClient
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from weaver_rl.types import Reply, Task


@asynccontextmanager
async def fake_service(
    home: Path,
    *,
    hook: Callable[[str, object], None] = lambda name, argument: None,
    deterministic: bool = True,
) -> AsyncIterator[AsyncServiceClient]:
    with anyio.fail_after(60):
        async with (
            LocalService(FakeEngine(hook=hook), home=home, deterministic=deterministic) as service,
            AsyncServiceClient(service=service, home=home) as client,
        ):
            yield client


def vowels(task: Task, reply: Reply) -> float:
    """The share of lower-case vowels: what the fake model can learn."""
    return sum(c in "aeiou" for c in reply.text) / max(1, len(reply.text))
