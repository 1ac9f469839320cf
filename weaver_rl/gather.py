"""`gather`: concurrent calls whose first error comes out as itself, not wrapped in a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio

from weaver.errors import WeaverError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

T = TypeVar("T")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Awaits all of them at the same time; the results in order.

    Raises:
        WeaverError: the first that any of them raised; the others are cancelled.
    """
    results: dict[int, T] = {}
    failed: list[WeaverError] = []

    async def run(index: int) -> None:
        try:
            results[index] = await calls[index]()
        except WeaverError as error:
            failed.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for index in range(len(calls)):
            tasks.start_soon(run, index)
    if failed:
        raise failed[0]
    return [results[index] for index in range(len(calls))]
