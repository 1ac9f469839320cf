"""Guards around code that is not ours, and around work that is done at the same time.

`attempt` and `attempt_async` are the one boundary of this package where exceptions end: rewards,
environments, tools and loggers run in them. What was raised becomes a `Failure`: a value with the
traceback, which the caller counts, shows, or tells the model. `task_group` and `gather` raise the
first error of concurrent work as itself; loops, rollouts and rewards use them.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from traceback import TracebackException
from types import ModuleType
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from weaver_rl.types import Failure, Place

T = TypeVar("T")


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """anyio's; where something in it fails the rest is cancelled, and the first error is raised."""
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except ExceptionGroup as group:
        error = innermost(group)
        raise error from error.__cause__


def innermost(error: Exception) -> Exception:
    """The first error of a group, or of a group in it; any other as it is."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Awaits all of them at the same time; the results in order."""
    results: dict[int, T] = {}

    async def run(index: int) -> None:
        results[index] = await calls[index]()

    async with task_group() as tasks:
        for index in range(len(calls)):
            tasks.start_soon(run, index)
    return [results[index] for index in range(len(calls))]


Through = tuple[type[BaseException], ...]


class _Boundary:
    """Around code that is not ours: what is raised inside ends here, as `failure`.

    KeyboardInterrupt and the classes `through` go on. What else is no `Exception` (SystemExit, the
    cancellation of something of its own, a panic in Rust) is a failure like any other.
    """

    failure: Failure

    def __init__(self, where: Place, through: Through) -> None:
        self._where = where
        self._through: Through = (KeyboardInterrupt, *through)

    def __enter__(self) -> _Boundary:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or isinstance(error, self._through):
            return False
        shown = TracebackException.from_exception(error)  # of any error: its text may raise too
        message = f"{type(error).__name__}: {shown}"
        self.failure = Failure(self._where, "raised", message, "".join(shown.format()))
        return True


def attempt(call: Callable[[], T], where: Place, *, through: Through = ()) -> T | Failure:
    """What `call` returns, or why it did not; errors of the classes `through` are raised."""
    with _Boundary(where, through) as boundary:
        return call()
    return boundary.failure


async def attempt_async(
    call: Callable[[], Awaitable[T]], where: Place, *, through: Through = ()
) -> T | Failure:
    """`attempt` for what is awaited; a cancellation of this task by its scopes goes through."""
    outcome: list[T | Failure] = []

    async def run() -> None:
        with _Boundary(where, (GeneratorExit, *through)) as boundary:
            outcome.append(await call())
            return
        await checkpoint_if_cancelled()
        outcome.append(boundary.failure)

    async with task_group() as tasks:  # whatever cancels this task cancels the scope of that one
        tasks.start_soon(run)
    return outcome[0]


def call_pickled(call: bytes) -> object:
    """What a pickled `call` returns in a worker process.

    A program without a file (`python -c`, a notebook) leaves the worker without a `__main__`, and
    packages that a reward imports look for it (dill, which torch imports).
    """
    sys.modules.setdefault("__main__", ModuleType("__main__"))
    return pickle.loads(call)()


def is_async(function: object) -> bool:
    """Whether calling it gives an awaitable: an async function, object or partial of one."""
    if isinstance(function, partial):
        return is_async(function.func)
    return inspect.iscoroutinefunction(function) or (
        callable(function) and inspect.iscoroutinefunction(type(function).__call__)
    )


def name_of(function: object) -> str:
    """The name of a function, a partial, an object that is called, or one of several replies, for
    people."""
    if isinstance(function, partial):
        return name_of(function.func)
    return str(getattr(function, "__name__", type(function).__name__))
