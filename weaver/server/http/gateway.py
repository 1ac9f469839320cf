"""`Gateway`: what stands between all wire formats of a server and its service.

Who may ask, how much is read at once, waits that end when the server stops, the counters. Each
request brings it along in its state. An `Adapter` is one of the wire formats.
"""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, TypeVar, cast
from weakref import WeakValueDictionary

import anyio
from fastapi import Depends, Request

from weaver import errors, protocol, wire
from weaver.config import is_loopback
from weaver.server.http.errors import Envelope, native_envelope
from weaver.server.http.telemetry import ServerMetrics
from weaver.server.keys import Caller, Keys
from weaver.server.machine import Machine
from weaver.tokenizers import store_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from starlette.routing import BaseRoute

    from weaver.server.http.tracing import Tracing
    from weaver.server.view import View

T = TypeVar("T")
BODY_LIMITS: Mapping[str, int | None] = {protocol.MEDIA_TYPE: None, "": 4 * 2**20}
"""Those of the native protocol; see `Adapter`."""
TINKER_KEY = "tml-"
"""Clients of Tinker's send no key that does not begin so."""
MESSAGE_HEADER_BYTES = 16 * 2**20
KEY_S = 1.0
"""A key that was good is not looked up again for so long: two queries an operation, each a tenth of
what the operation costs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """One wire format: routes, and what holds for every request that is theirs.

    `App` mounts any number of them, also below one prefix. What is not given is as in the native
    protocol.

    Args:
        routes: with their whole paths.
        prefix: with which their paths begin. What nobody has a route for belongs to the adapter
            with the longest prefix of it, and among equals to the one that was mounted first.
        envelope: makes the answer to a request that is refused.
        body_limits: the most bytes of a body, by its media type; "" is any other, and None is as
            many as the server takes.
        open_paths: need no key.
        open_below: with which other paths begin that need none. Those may be secrets, and are not
            written to the log.
    """

    routes: Sequence[BaseRoute]
    prefix: str
    envelope: Envelope = native_envelope
    body_limits: Mapping[str, int | None] = field(default_factory=lambda: BODY_LIMITS)
    open_paths: tuple[str, ...] = ()
    open_below: tuple[str, ...] = ()


class Gateway:
    """What the requests of one server share.

    Args:
        keys: None: everybody is the administrator of one project; for loopback only.
        folder: where tokenizers are kept for clients on this machine; None: they are not.
    """

    def __init__(self, service: View, keys: Keys | None, *, folder: Path | None = None) -> None:
        self.service = service
        self.keys = keys
        self.folder = folder
        self.metrics = ServerMetrics(service.parts.activity, service.parts.engine)
        self.machine = Machine(service.parts.live.root.parent)
        self.tracing: Tracing | None = None
        self.stopping = anyio.Event()
        """Once set, long polls end and new requests are told to come back."""
        size, tokens = service.parts.limits.body_bytes, service.parts.limits.operation_tokens
        self.message_limits = wire.WireLimits(
            header_bytes=min(size, MESSAGE_HEADER_BYTES),
            array_bytes=size,
            list_numbers=tokens and 2 * tokens,
        )
        self._reading_bytes = self._free_bytes = 2 * self.message_limits.message_bytes
        """That requests may take together while they are read, and what is left of it."""
        self._freed = anyio.Condition()
        self._readers = anyio.CapacityLimiter(2)
        """More threads would take the interpreter from the event loop."""
        self._good_keys: dict[bytes, tuple[Caller, float]] = {}
        self._waits: set[anyio.CancelScope] = set()
        self._resends: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
        self._owned: dict[type, object] = {}

    def body_bytes(self, adapter: Adapter, media_type: str) -> int:
        """The limit of a body of this type, where the adapter may have its own."""
        kind = media_type.partition(";")[0].strip()
        limit = adapter.body_limits.get(kind, adapter.body_limits[""])
        most = self.service.parts.limits.body_bytes
        return self.message_limits.message_bytes if limit is None else min(most, limit)

    def own(self, kind: type[T]) -> T:
        """The one `kind()` of this server: what an adapter keeps from request to request."""
        kept = self._owned.setdefault(kind, kind())
        assert isinstance(kept, kind)
        return kept

    @asynccontextmanager
    async def read(self, announced_bytes: int, work: Callable[[], T]) -> AsyncIterator[T]:
        """What `work` makes of a body; what that announces is taken until this is left.

        Waits until so many bytes are free; little always is, and more than all waits for all.
        """
        large = announced_bytes > wire.LARGE_BYTES
        size = min(announced_bytes, self._reading_bytes) if large else 0
        async with self._freed:
            while size > self._free_bytes:
                await self._freed.wait()
            self._free_bytes -= size
        try:
            yield await wire.beside(announced_bytes, work, limiter=self._readers)
        finally:
            with anyio.CancelScope(shield=True):
                async with self._freed:
                    self._free_bytes += size
                    self._freed.notify_all()

    def stop(self) -> None:
        """Ends long polls; who comes from now on is told to come back."""
        self.stopping.set()
        for wait in self._waits:
            wait.cancel()

    @contextmanager
    def until_it_stops(self) -> Iterator[None]:
        """What waits inside is left when the server stops."""
        with anyio.CancelScope() as scope:
            if self.stopping.is_set():
                scope.cancel()
            self._waits.add(scope)
            try:
                yield
            finally:
                self._waits.discard(scope)

    async def wait(self, event: anyio.Event, timeout_s: float) -> None:
        """Until it is set, at most so long."""
        with self.until_it_stops(), anyio.move_on_after(timeout_s):
            await event.wait()

    async def tokenizer_path(self, service: View, base_model: str, *, client: str) -> str | None:
        """A folder from which a client on this machine loads the tokenizer; None for any other.

        Those take it from where `base_model` says, or the native client fetches it.
        """
        if self.folder is None or not is_loopback(client):
            return None
        try:
            files = await service.tokenizer_files(base_model)
        except errors.UnsupportedError:  # it has none
            return None
        folder = self.folder / "tokenizers"
        return str(await anyio.to_thread.run_sync(store_tokenizer, files, folder))

    def alone(self, key: str) -> anyio.Lock:
        """To be held while a request is answered: a resend waits for what becomes of it."""
        return self._resends.setdefault(key, anyio.Lock())

    async def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Who asks, by `Authorization: Bearer`, `X-WEAVER-API-KEY` or `X-API-Key`.

        Raises:
            AuthenticationError: no key, or one that is unknown or revoked.
        """
        if self.keys is None:
            return Caller(project="default", admin=True)
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        secret = token.strip() if scheme.lower() == "bearer" else ""
        secret = secret or headers.get("X-WEAVER-API-KEY", "")
        secret = secret or headers.get("X-API-Key", "").removeprefix(TINKER_KEY)
        if not secret:
            raise errors.AuthenticationError(
                "the request has no API key.",
                hint="Set WEAVER_API_KEY; on the server, `weaver keys create` makes one.",
            )
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        caller, good_until = self._good_keys.get(digest, (None, 0.0))
        now = anyio.current_time()
        if caller is None or now > good_until:
            caller = await anyio.to_thread.run_sync(self.keys.authenticate, secret)
            good = {key: known for key, known in self._good_keys.items() if now <= known[1]}
            self._good_keys = good | {digest: (caller, now + KEY_S)}
        return caller


# Dependencies are coroutines because the framework calls plain functions in a thread.
async def gateway_of(request: Request) -> Gateway:
    return cast("Gateway", request.state.gateway)


async def service_of(request: Request) -> View:
    return cast("View", request.state.service)


GatewayDep = Annotated[Gateway, Depends(gateway_of)]
ServiceDep = Annotated["View", Depends(service_of)]
