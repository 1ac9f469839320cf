"""Threads that compute in torch and the like, and how a program ends while they do.

A thread that comes back to Python after the interpreter's end is unwound by the C library, at which
C++ and Rust abort the process. So what runs there is registered: at the program's end it is
interrupted where it next reaches Python code, and waited for until then. The engine, custom losses,
tokenizers and rewards run so.
"""

from __future__ import annotations

import atexit
import contextvars
import ctypes
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import current_token

T = TypeVar("T")

USER_CODE_S = 3.0
"""How long a program's end waits for a reward or tool that does not let itself be interrupted."""

_inside: dict[int, tuple[threading.Event, float]] = {}
"""By thread: set when it has come out, and how long the program's end waits for that, seconds."""
_ending = threading.Event()


class _ProgramEnds(SystemExit):
    """Raised inside of what still runs; a thread that it ends says nothing."""


def out_at_exit(call: Callable[[], T], *, patience_s: float = math.inf) -> T:
    """Runs `call` in this thread, so that the program never ends inside of it."""
    thread, out = threading.get_ident(), threading.Event()

    def leave() -> None:
        _inside.pop(thread, None)
        out.set()

    _inside[thread] = out, patience_s
    try:
        try:
            if _ending.is_set():
                raise _ProgramEnds
            return call()
        finally:
            leave()
    except _ProgramEnds:  # it may have come in the midst of `leave`
        leave()
        threading.Event().wait()  # for the end: nobody is told of a result that there is not
        raise


def call_soon(loop: Any, call: Callable[[], object]) -> None:
    """Has an event loop, a `current_token().native_token`, call it; nothing if the loop has ended.

    It does not wait for that, as `anyio.from_thread` does.
    """
    put = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # asyncio's, or trio's
    with suppress(RuntimeError):
        put(call)


class Call(Generic[T]):
    """Some work on its way to another thread, and what became of it; made on the event loop."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.loop = current_token().native_token
        self._work = partial(contextvars.copy_context().run, work)
        self._outcome = Future[T]()
        self._done = anyio.Event()

    def run(self, *, patience_s: float = math.inf) -> bool:
        """In that thread; False if nobody waited any more before it began."""
        if not self._outcome.set_running_or_notify_cancel():
            return False
        try:
            self._outcome.set_result(out_at_exit(self._work, patience_s=patience_s))
        except BaseException as error:  # raised again where it is awaited
            self._outcome.set_exception(error)
        return True

    def tell(self) -> None:
        """On the event loop, once it has run."""
        self._done.set()

    async def wait(self) -> T:
        """What the work returns or raises; where this is cancelled, what has begun goes on."""
        try:
            await self._done.wait()
        finally:
            self._outcome.cancel()
        return self._outcome.result()


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """What a user's code returns or raises; where the caller is cancelled, what has begun goes on.

    It runs in a thread of its own, which nothing joins, so that one that hangs holds up no
    shutdown: the end of the interpreter waits for anyio's own worker threads, however long.
    """
    call = Call(work)

    def run() -> None:
        if call.run(patience_s=USER_CODE_S):
            call_soon(call.loop, call.tell)

    threading.Thread(target=run, name="weaver-user-code", daemon=True).start()
    return await call.wait()


@atexit.register
def _interrupt_all() -> None:
    _ending.set()
    raise_in: Any = ctypes.pythonapi.PyThreadState_SetAsyncExc
    inside = dict(_inside)
    for thread in inside:
        raise_in(ctypes.c_ulong(thread), ctypes.py_object(_ProgramEnds))
    for out, patience_s in inside.values():
        out.wait(None if patience_s == math.inf else patience_s)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inside.clear)  # the child has none of these threads
