"""`Front`: what all routes of one app share; each request brings it along in its state."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from weaver.errors import AuthenticationError
from weaver.server.activity import Activity
from weaver.server.compat.weaver_rest_errors import PREFIX
from weaver.server.http.metrics import ServerMetrics
from weaver.server.http.replies import Replies
from weaver.server.keys import Caller
from weaver.wire import WireLimits

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.datastructures import Headers

    from weaver.server.compat.weaver_rest_operations import Desk
    from weaver.server.keys import Keys
    from weaver.server.scoped import Scopes

MEDIA_TYPE = "application/vnd.weaver"
JSON_BODY_BYTES = 4 * 2**20
REST_JSON_BYTES = 64 * 2**20
"""There, JSON carries training data: a million tokens."""
MESSAGE_LIMITS = WireLimits(header_bytes=16 * 2**20, array_bytes=256 * 2**20)
LONGEST_POLL_S = 25.0
"""Below the 30 s after which common proxies give up on a silent answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What one request may bring."""

    message: WireLimits = MESSAGE_LIMITS
    submissions: int = 1024

    def body_bytes(self, media_type: str, path: str) -> int:
        if path.startswith(PREFIX):
            binary = media_type.startswith("multipart/form-data")
            return self.message.message_bytes if binary else REST_JSON_BYTES
        return self.message.message_bytes if media_type == MEDIA_TYPE else JSON_BODY_BYTES


LIMITS = ServerLimits()


@dataclass(slots=True, eq=False, kw_only=True)
class Front:
    scopes: Scopes
    keys: Keys | None
    """None: everybody is the administrator of one project; for loopback only."""
    limits: ServerLimits = LIMITS
    activity: Activity = field(default_factory=Activity)
    """Of the service."""
    metrics: ServerMetrics = field(init=False)
    replies: Replies = field(default_factory=Replies)
    stopping: anyio.Event = field(default_factory=anyio.Event)
    """Once set, long polls end and new requests are told to come back."""
    folder: Path | None = None
    """Where tokenizers are kept for clients on this machine; None: they are not."""
    desks: dict[Caller, Desk] = field(default_factory=dict)
    """Of callers of the Weaver REST interface."""
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """Signs addresses of downloads, which end with the process."""

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(self.activity)

    async def authenticate(self, headers: Headers) -> Caller:
        """Who asks, by `Authorization: Bearer` or `X-WEAVER-API-KEY`.

        Raises:
            AuthenticationError: no key, or one that is unknown or revoked.
        """
        if self.keys is None:
            return Caller(project="default", admin=True)
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        secret = token.strip() if scheme.lower() == "bearer" else ""
        secret = secret or headers.get("X-WEAVER-API-KEY", "")
        if not secret:
            raise AuthenticationError(
                "the request has no API key.",
                hint="Set WEAVER_API_KEY; on the server, `weaver keys create` makes one.",
            )
        return await anyio.to_thread.run_sync(self.keys.authenticate, secret)
