"""Guards around code that is not ours, and around work that is done at the same time.

`attempt` and `attempt_async` are the one place of this package that catches any exception: rewards,
environments, tools and loggers run in them. What was raised becomes a `Failure`: a value with the
traceback, which the caller counts, shows, or tells the model. `task_group` and `gather` raise the
first error of concurrent work as itself; loops, rollouts and rewards use them.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from contextlib import asynccontextmanager
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from weaver_rl.types import Failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from anyio.abc import TaskGroup

    from weaver_rl.types import Place

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


Through = tuple[type[Exception], ...]


def attempt(call: Callable[[], T], where: Place, *, through: Through = ()) -> T | Failure:
    """What `call` returns, or why it did not; errors of the classes `through` are raised.

    So is KeyboardInterrupt. What else is no `Exception` (SystemExit, the cancellation of something
    of its own, a panic in Rust) is a failure like any other.
    """
    try:
        return call()
    except through:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return failure_of(error, where)


def call_pickled(call: bytes) -> object:
    """What a pickled `call` returns in a worker process.

    A program without a file (`python -c`, a notebook) leaves the worker without a `__main__`, and
    packages that a reward imports look for it (dill, which torch imports).
    """
    sys.modules.setdefault("__main__", ModuleType("__main__"))
    return pickle.loads(call)()


async def attempt_async(
    call: Callable[[], Awaitable[T]], where: Place, *, through: Through = ()
) -> T | Failure:
    """`attempt` for what is awaited; a cancellation of this task by its scopes goes through."""
    outcome: list[T | Failure] = []

    async def run() -> None:
        try:
            outcome.append(await call())
        except through:
            raise
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            await checkpoint_if_cancelled()
            outcome.append(failure_of(error, where))

    async with task_group() as tasks:  # whatever cancels this task cancels the scope of that one
        tasks.start_soon(run)
    return outcome[0]


def failure_of(error: BaseException, where: Place) -> Failure:
    """An exception as a value, with its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return Failure(where, "raised", f"{type(error).__name__}: {message}", text)
