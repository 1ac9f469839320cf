"""Concurrent work whose first error comes out as itself, not wrapped in a group."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from anyio.abc import TaskGroup

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """anyio's; where something in it fails the rest is cancelled, and the first error is raised."""
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except ExceptionGroup as group:
        error: Exception = group
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Awaits all of them at the same time; the results in order."""
    results: dict[int, T] = {}

    async def run(index: int) -> None:
        results[index] = await calls[index]()

    async with task_group() as tasks:
        for index in range(len(calls)):
            tasks.start_soon(run, index)
    return [results[index] for index in range(len(calls))]
