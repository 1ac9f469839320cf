"""`suggesting`: what people call says which keyword was meant, in place of an unknown one.

Clients, plans and the functions of `weaver_rl` that take many keywords are decorated with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from weaver.errors import nearest

T = TypeVar("T", bound="Callable[..., Any]")
UNKNOWN = re.compile(r"^(.*\(\)) got an unexpected keyword argument '(.*)'")


class UnknownKeywordError(TypeError):
    """`optim_step() got an unexpected keyword argument 'lr'. Did you mean 'learning_rate'?`"""


def suggesting(target: T) -> T:
    """A function, or a class with its public methods, whose errors of keywords have a hint."""
    if not inspect.isclass(target):
        return _suggesting(target)
    for name, value in list(vars(target).items()):
        if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
            setattr(target, name, _suggesting(value))
    return target


def _suggesting(function: T) -> T:
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def called(*args: Any, **kwargs: Any) -> Any:
            try:
                coroutine = function(*args, **kwargs)
            except TypeError as error:
                raise _meant(function, error) from error.__cause__
            return await coroutine

        return called  # type: ignore[return-value]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            raise _meant(function, error) from error.__cause__

    return call  # type: ignore[return-value]


def _meant(function: Callable[..., Any], error: TypeError) -> TypeError:
    """With a hint, if the call itself was wrong, and not one inside the function."""
    found = UNKNOWN.match(str(error))
    inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
    if found is None or inside:
        return error
    known = [
        name
        for name, one in inspect.signature(function).parameters.items()
        if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD) and name != "self"
    ]
    said = f"{found[1]} got an unexpected keyword argument {found[2]!r}."
    return UnknownKeywordError(f"{said} {nearest(found[2], known)}")
