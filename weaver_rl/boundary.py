"""The boundary around code that is not ours: rewards, environments, tools, loggers.

The one place of this package that catches any exception. What was raised becomes a `Failure`: a
value with the traceback, which the caller counts, shows, or tells the model.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from anyio.lowlevel import checkpoint_if_cancelled

from weaver_rl.gather import task_group
from weaver_rl.types import Failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weaver_rl.types import Place

T = TypeVar("T")
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
