"""Sync methods made from async ones; `weaver.client.sync` is written with them.

A made method has its async twin's name, docstring and signature, for the type checker too.
"""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from weaver.client.portal import Handle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weaver.client.handle import OperationHandle
    from weaver.client.portal import Portal

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


class Twin(Generic[A]):
    """A sync client: its async twin `A`, and the portal to the event loop in which that lives."""

    def __init__(self, inner: A, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal


def blocking(
    method: Callable[Concatenate[A, P], Awaitable[T]],
) -> Callable[Concatenate[Twin[A], P], T]:
    """A method that waits for the result."""

    @wraps(method)
    def call(self: Twin[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._portal.call(partial(method, self._inner, *args, **kwargs))

    return call


def making(
    method: Callable[Concatenate[A, P], Awaitable[T]], cls: Callable[[T, Portal], C]
) -> Callable[Concatenate[Twin[A], P], C]:
    """A method that waits for an async client and answers its sync twin, a `cls`."""

    @wraps(method)
    def call(self: Twin[A], /, *args: P.args, **kwargs: P.kwargs) -> C:
        inner = self._portal.call(partial(method, self._inner, *args, **kwargs))
        return cls(inner, self._portal)

    return call


def queued(
    method: Callable[..., OperationHandle[Any]], *, wait: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method with one more keyword, `wait`: True gives the result, False a `Handle` at once.

    It replaces the decorated function, which only stands behind the overloads: a ParamSpec cannot
    add a keyword, nor make the type of the answer depend on it.
    """
    default = wait

    @wraps(method)
    def call(self: Twin[Any], /, *args: Any, wait: bool = default, **kwargs: Any) -> Any:
        queue = partial(method, self._inner, *args, **kwargs)
        if wait:
            return self._portal.call(queue)
        return Handle(self._portal.call_soon(queue), self._portal)

    theirs = inspect.signature(method)
    last = inspect.Parameter("wait", inspect.Parameter.KEYWORD_ONLY, default=default)
    signature = theirs.replace(parameters=[*theirs.parameters.values(), last])
    vars(call)["__signature__"] = signature

    def replace(placeholder: Callable[..., Any]) -> Callable[..., Any]:
        call.__module__, call.__qualname__ = placeholder.__module__, placeholder.__qualname__
        return call

    return replace
