"""`Session`: being joined to a Ray, for as long as its head and this machine's node of it run.

`Cluster` makes one, and another when Ray is back. A process that has joined cannot do without the
two: Ray itself lets calls wait for a head that has ended, and ends the process after a minute. So a
thread holds a connection to each, which says nothing, and breaks when what listened there ends.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from typing import Any

import ray
from anyio import CancelScope
from anyio.lowlevel import current_token

from weaver.boundary import attempt
from weaver.errors import EngineLostError
from weaver.threads import call_soon

logger = logging.getLogger(__name__)
CONNECT_S = 5.0
SILENCE_S = 20
"""After so long without an answer to TCP's own probes a machine counts as gone."""


class Session:
    """From `ray.init`, which has been called, until `ray.shutdown`."""

    def __init__(self) -> None:
        self.address: str = ray.get_runtime_context().gcs_address
        self.fault: str | None = None
        """Why it is lost."""
        self.left = threading.Event()
        """Set when Ray's library is let go of, after that."""
        self._gone = Future[None]()
        self._tells: set[Callable[[], None]] = set()
        self._lines: list[socket.socket] = []
        self._lock = threading.Lock()
        here = ray.get_runtime_context().get_node_id()
        [node] = [node for node in ray.nodes() if node["NodeID"] == here]
        raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        for what, where in (("head", self.address), ("node on this machine", raylet)):
            threading.Thread(target=self._watch, args=(what, where), daemon=True).start()

    @contextmanager
    def needed(self) -> Iterator[None]:
        """What is awaited inside is given up when the session is lost.

        Raises:
            EngineLostError: it is, or was before.
        """
        loop, scope = current_token().native_token, CancelScope()

        def tell() -> None:
            call_soon(loop, scope.cancel)

        with self._lock:
            if self.fault is not None:
                raise EngineLostError(self.fault)
            self._tells.add(tell)
        try:
            with scope:
                yield
        finally:
            self._tells.discard(tell)
        if scope.cancelled_caught:
            raise EngineLostError(self.fault or "Ray is gone")

    def result(self, reference: Any, within_s: float) -> Any:
        """What an actor answers, waited for in a thread.

        Raises:
            EngineLostError: the session is lost.
            TimeoutError: it is not there in time.
        """
        if self.fault is None:
            future: Future[Any] = reference.future()
            wait([future, self._gone], timeout=within_s, return_when=FIRST_COMPLETED)
            if future.done() or self.fault is None:
                return future.result(0)
        raise EngineLostError(self.fault)

    def leave(self) -> None:
        """Lets go of Ray, and ends it if it was started here. Blocks some seconds at most."""
        if self._lose("this process has left Ray"):
            for line in list(self._lines):
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
            ray.shutdown()
            self.left.set()

    def _watch(self, what: str, where: str) -> None:
        host, _, port = where.rpartition(":")
        while True:
            try:
                line = socket.create_connection((host.strip("[]"), int(port)), CONNECT_S)
            except OSError:
                break
            with line, suppress(OSError):  # how it ends does not matter: who listens is asked again
                self._lines.append(line)
                _probing(line)
                while line.recv(4096):
                    pass
            self._lines.remove(line)
            if self.fault is not None:
                return
        if self._lose(f"Ray's {what} at {where} has ended"):
            logger.error("%s", self.fault)
            attempt(ray.shutdown)
            self.left.set()

    def _lose(self, why: str) -> bool:
        """Whether this was the first to say so."""
        with self._lock:
            if self.fault is not None:
                return False
            self.fault = why
            tells: list[Any] = list(self._tells)
        self._gone.set_result(None)
        for tell in tells:
            tell()
        return True


def _probing(line: socket.socket) -> None:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 2)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 4)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
