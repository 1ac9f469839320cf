"""The Weaver REST interface, for programs written for `nex-weaver`: an adapter below /api/v1."""

from __future__ import annotations

from weaver.protocol import MEDIA_TYPE
from weaver.server.adapters.weaver_rest import artifacts, routes
from weaver.server.adapters.weaver_rest.answers import refused
from weaver.server.http.gateway import Adapter

JSON_BYTES = 32 * 2**20
"""JSON carries training data: half a million tokens."""

WEAVER_REST = Adapter(
    routes=[*routes.router.routes, *artifacts.router.routes],
    prefix=routes.PREFIX,
    envelope=refused,
    body_limits={MEDIA_TYPE: None, "multipart/form-data": None, "": JSON_BYTES},
    open_below=(f"{routes.PREFIX}/downloads/",),
)
