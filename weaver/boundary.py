"""The boundary around an operation, where whatever happens inside becomes a value.

And that around code of others, whose errors become ours. Called by the service and by engines.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread

from weaver.errors import EngineError, WeaverError
from weaver.threads import out_at_exit

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def attempt(work: Callable[[*Ts], T], *args: *Ts) -> T | WeaverError:
    """What `work` returns, or why it failed. A defect is logged and becomes an `EngineError`."""
    try:
        return work(*args)
    except WeaverError as error:
        return error
    except Exception as error:
        return _defect(error)


async def attempt_async(work: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T | WeaverError:
    """The same, of what has to be awaited."""
    try:
        return await work(*args)
    except WeaverError as error:
        return error
    except Exception as error:
        return _defect(error)


def _defect(error: Exception) -> EngineError:
    logger.exception("an operation failed through a defect", exc_info=error)
    return EngineError(
        f"{type(error).__name__}: {error}",
        hint="The service's log has the traceback; the service goes on.",
    )


@contextmanager
def converting(to: Callable[[Exception], Exception]) -> Iterator[None]:
    """Around code of others: whatever it raises is raised as the error that `to` answers for it."""
    try:
        yield
    except Exception as error:
        converted = to(error)
        if converted is error:
            raise
        raise converted from error


def or_raise(value: T | WeaverError) -> T:
    """The value that `attempt` answered; its error is raised here."""
    if isinstance(value, WeaverError):
        raise value
    return value


async def blocking(
    work: Callable[[*Ts], T], *args: *Ts, limiter: CapacityLimiter | None = None
) -> T:
    """What `work` returns or raises, in a worker thread: disks are slow, and merges torch's work.

    A defect in it becomes an `EngineError`.
    """
    call = partial(out_at_exit, lambda: attempt(work, *args))
    return or_raise(await to_thread.run_sync(call, limiter=limiter))
