"""The boundary around code that is not ours: rewards, environments, tools, loggers.

The one place of this package that catches any exception. What was raised becomes a `Failure`: a
value with the traceback, which the caller counts, shows, or tells the model.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, TypeVar

from weaver_rl.types import Failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weaver_rl.types import Place

T = TypeVar("T")
Through = tuple[type[Exception], ...]


def attempt(call: Callable[[], T], where: Place, *, through: Through = ()) -> T | Failure:
    """What `call` returns, or why it did not; errors of the classes `through` are raised."""
    try:
        return call()
    except through:
        raise
    except (Exception, SystemExit) as error:
        return failure_of(error, where)


async def attempt_async(
    call: Callable[[], Awaitable[T]], where: Place, *, through: Through = ()
) -> T | Failure:
    """`attempt` for what is awaited; a cancellation goes through."""
    try:
        return await call()
    except through:
        raise
    except Exception as error:
        return failure_of(error, where)


def failure_of(error: BaseException, where: Place) -> Failure:
    """An exception as a value, with its traceback."""
    text = "".join(traceback.format_exception(error))
    return Failure(where, "raised", f"{type(error).__name__}: {error}", text)
