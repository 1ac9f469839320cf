"""`suggesting`: what people call says which keyword was meant, in place of an unknown one.

Clients are decorated with it; `suggest_throughout` decorates all that a package gives to users.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
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
    if getattr(target, "_is_protocol", False):
        return target
    for name, value in list(vars(target).items()):
        if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
            setattr(target, name, _suggesting(value))
    return target


def suggest_throughout(*packages: str) -> None:
    """Decorates what these give to users, there and in their modules that define it."""
    for package in packages:
        given: dict[str, Any] = dict(vars(sys.modules[package]))
        for name, value in given.items():
            module = str(getattr(value, "__module__", None))
            ours = callable(value) and module.startswith(package.partition(".")[0])
            there: Any = getattr(sys.modules.get(module), name, None)
            if ours and there is value:
                decorated = suggesting(value)
                for each in (module, package):
                    setattr(sys.modules[each], name, decorated)


def _suggesting(function: T) -> T:
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except TypeError as error:
                if (meant := _meant(function, error, kwargs)) is None:
                    raise
                raise meant from None

        return called  # type: ignore[return-value]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            if (meant := _meant(function, error, kwargs)) is None:
                raise
            raise meant from None

    return call  # type: ignore[return-value]


def _meant(
    function: Callable[..., Any], error: TypeError, given: Mapping[str, Any]
) -> UnknownKeywordError | None:
    """The error with a hint, if the call itself was wrong, and not one inside the function."""
    found = UNKNOWN.match(str(error))
    if found is None:
        return None
    signature = inspect.signature(function)
    known = [
        name
        for name, one in signature.parameters.items()
        if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD) and name != "self"
    ]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    if takes_any or found[2] in known or found[2] not in given:
        return None
    said = f"{found[1]} got an unexpected keyword argument {found[2]!r}."
    return UnknownKeywordError(f"{said} {nearest(found[2], known)}")
