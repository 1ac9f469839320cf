"""Tinker's protocol, for programs written for the `tinker` package: an adapter below /api/v1."""

from __future__ import annotations

from weaver.server.adapters.tinker import absent, downloads, messages, records, routes
from weaver.server.adapters.tinker.answers import refused
from weaver.server.http.gateway import Adapter

JSON_BYTES = 32 * 2**20
PASS_BYTES = 64 * 2**20
"""Clients split a pass above 5 MB; a single datum may be larger."""

SESSIONS = f"{routes.PREFIX}/sessions/session-"
"""Below which all is this protocol's, though another one has routes of sessions, too."""
ROUTES = [route for part in (routes, records, downloads, absent) for route in part.router.routes]
LIMITS = {messages.MEDIA_TYPE: PASS_BYTES, "": JSON_BYTES}

TINKER = tuple(
    Adapter(
        routes=[route for route in ROUTES if (SESSIONS in getattr(route, "path", "")) == own],
        prefix=SESSIONS if own else routes.PREFIX,
        envelope=refused,
        body_limits=LIMITS,
        open_below=(downloads.FILES,),
    )
    for own in (True, False)
)
