"""How the sync clients reach the async ones: an event loop in a thread, and methods that cross.

`weaver.client.sync` is written with them. A made method has its async twin's name, docstring and
signature, for the type checker too.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial, wraps
from html import escape
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from anyio.from_thread import run_sync, start_blocking_portal
from anyio.lowlevel import current_token

from weaver.client.handle import OperationHandle, Process, Status
from weaver.client.service import AsyncServiceClient
from weaver.errors import ClosedError, WeaverError

A = TypeVar("A", covariant=True)
P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")
F = TypeVar("F", bound="Callable[..., Any]")
ANOTHER = "] | OperationHandle["
"""Between two of what a method may answer, in its annotation."""


class Twin(Generic[A]):
    """What is sync: its async twin `A`, and the portal to the event loop in which that lives."""

    def __init__(self, inner: A, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal

    def __init_subclass__(cls) -> None:
        """Methods that are made of async ones are its own: by name, and by what they answer."""
        for name, method in list(vars(cls).items()):
            if hasattr(method, "__wrapped__"):
                _adopt(method, f"{cls.__qualname__}.{name}", cls.__module__)

    def __repr__(self) -> str:
        return repr(self._inner).replace("Async", "", 1)

    def _repr_html_(self) -> str:
        show = getattr(self._inner, "_repr_html_", None)
        return show() if show else f"<code>{escape(repr(self))}</code>"


class Handle(Twin[OperationHandle[T]]):
    """The result to come of an operation that was queued with `wait=False`."""

    def result(self, timeout: float | None = None) -> T:
        """Blocks until the result is there; `timeout` is in seconds, None waits for good.

        Raises:
            WaitTimeoutError: not finished in time; the operation goes on.
            OperationCancelledError: it was cancelled.
            WeaverError: whatever made the operation fail.
        """
        for wait_s in self._inner.waits(timeout):
            self._portal.check_caller()
            with suppress(TimeoutError):
                self._inner.outcome.exception(wait_s)
        error = self._inner.outcome.exception()
        if isinstance(error, WeaverError):
            raise error.with_traceback(None)  # which would grow with each call
        return self._inner.outcome.result()

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._inner.done()

    def cancel(self) -> bool:
        """Asks to withdraw the operation; see `OperationHandle.cancel`."""
        return not self.done() and self._portal.run(self._inner.cancel)

    @property
    def status(self) -> Status:
        return self._inner.status

    def __repr__(self) -> str:
        return f"<Handle {self._inner.label}: {self.status}>"


class Portal:
    """Opens an `AsyncServiceClient` in a thread of its own, until `close`, exit or collection."""

    def __init__(self, client: AsyncServiceClient) -> None:
        self._process = Process()
        with ExitStack() as stack:
            self._loop = stack.enter_context(start_blocking_portal(name="weaver"))
            self._token = self._loop.call(current_token)
            self._thread_id = self._loop.call(threading.get_ident)
            stack.enter_context(self._loop.wrap_async_context_manager(client))
            self._stack = stack.pop_all()
        self._collected = weakref.finalize(self, _close_elsewhere, self._stack, self._process)
        self._collected.atexit = False
        # At exit the engine must stop first: a thread inside torch would crash the interpreter.
        self._at_exit = partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)

    def close(self) -> None:
        """Leaves the client and ends the thread; a second call, or one in a fork, does nothing."""
        if self._collected.detach():
            atexit.unregister(self._at_exit)
            _close(self._stack, self._process)

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs an async function and waits; an interrupted wait cancels only the waiting."""
        self._check_open()
        self._process.check()
        future = self._loop.start_task_soon(function)
        try:
            return future.result()
        finally:
            future.cancel()  # what is done cannot be cancelled

    def run(self, function: Callable[[], T]) -> T:
        """Runs a plain function in the loop's thread: half the time of a task there."""
        self._check_open()
        self.check_caller()
        return run_sync(function, token=self._token)

    def check_caller(self) -> None:
        """
        Raises:
            UnsupportedError: in a fork, which has no such thread.
            RuntimeError: in the loop's own thread, which would wait for itself.
        """
        self._process.check()
        if threading.get_ident() == self._thread_id:
            raise RuntimeError("a sync client was used in its own event loop's thread.")

    def _check_open(self) -> None:
        if not self._collected.alive:
            raise ClosedError("the client was closed.", hint="Make a new ServiceClient.")


def blocking(
    method: Callable[Concatenate[A, P], Awaitable[T]],
) -> Callable[Concatenate[Twin[A], P], T]:
    """A method that waits for the result."""

    @wraps(method)
    def call(self: Twin[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return self._portal.call(partial(method, self._inner, *args, **kwargs))
        except (WeaverError, TypeError) as raised:
            error = _own(raised)
        raise error

    return call


def making(
    method: Callable[Concatenate[A, P], Awaitable[T]], cls: Callable[[T, Portal], C]
) -> Callable[Concatenate[Twin[A], P], C]:
    """A method that waits for an async client and answers its sync twin, a `cls`."""

    @wraps(method)
    def call(self: Twin[A], /, *args: P.args, **kwargs: P.kwargs) -> C:
        try:
            made = self._portal.call(partial(method, self._inner, *args, **kwargs))
        except (WeaverError, TypeError) as raised:
            error = _own(raised)
        else:
            return cls(made, self._portal)
        raise error

    return call


def queued(method: Callable[..., OperationHandle[Any]], *, wait: bool) -> Callable[[F], F]:
    """A method with one more keyword, `wait`: True gives the result, False a `Handle` at once.

    It replaces the decorated function, which only stands behind the overloads: a ParamSpec cannot
    add a keyword, nor make the type of the answer depend on it. Methods of the same arguments and
    result may share one function, and so its overloads.
    """
    default = wait

    @wraps(method)
    def call(self: Twin[Any], /, *args: Any, wait: bool = default, **kwargs: Any) -> Any:
        try:
            queue = partial(method, self._inner, *args, **kwargs)
            handle = Handle(self._portal.run(queue), self._portal)
            return handle.result() if wait else handle
        except (WeaverError, TypeError) as raised:
            error = _own(raised)
        raise error

    theirs = inspect.signature(method)
    last = inspect.Parameter(
        "wait", inspect.Parameter.KEYWORD_ONLY, default=default, annotation="bool"
    )
    answer = theirs.return_annotation if wait else f"Handle[{_result(theirs.return_annotation)}]"
    signature = theirs.replace(
        parameters=[*theirs.parameters.values(), last], return_annotation=answer
    )
    vars(call)["__signature__"] = signature

    def replace(_placeholder: F) -> F:
        return cast("F", call)

    return replace


def _own(error: WeaverError | TypeError) -> WeaverError | TypeError:
    """The error of an async twin as that of the sync one.

    It names the sync method where a call was wrong, and its way through the event loop is left out:
    what was raised on purpose says what is wrong; what was not keeps its traceback.
    """
    if isinstance(error, WeaverError):
        return error.with_traceback(None)
    if str(error).startswith("Async"):
        return type(error)(str(error).replace("Async", "", 1))
    return error


def _adopt(method: Any, qualname: str, module: str) -> None:
    if method.__module__ == module and not method.__qualname__.startswith("Async"):
        return  # another name of the same method
    signature = inspect.signature(method)
    answer = _result(signature.return_annotation).replace("Async", "")
    method.__signature__ = signature.replace(return_annotation=answer)
    method.__module__, method.__qualname__ = module, qualname
    method.__name__ = qualname.rpartition(".")[2]
    del method.__wrapped__  # which says that it is a coroutine


def _result(annotation: Any) -> str:
    """What an async method answers in the end, of its annotation."""
    text = str(annotation)
    if not text.startswith("OperationHandle["):
        return text
    return " | ".join(text.removesuffix("]").removeprefix("OperationHandle[").split(ANOTHER))


def _close(stack: ExitStack, process: Process) -> None:
    if process.is_here:
        stack.close()
    else:  # never collected: the generator in it, finished, would wait for a thread of the parent
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stack))


def _close_elsewhere(stack: ExitStack, process: Process) -> None:
    # Garbage may be collected in any thread, the loop's own included, where closing would block.
    threading.Thread(target=_close, args=(stack, process), name="weaver-close", daemon=True).start()


def _close_if_alive(portal: weakref.ref[Portal]) -> None:
    if (alive := portal()) is not None:
        alive.close()
