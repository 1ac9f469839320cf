"""OpenAI's protocol, for the programs that speak it: an adapter below /v1."""

from __future__ import annotations

from weaver.server.adapters.openai import routes
from weaver.server.adapters.openai.answers import refused
from weaver.server.http.gateway import Adapter

JSON_BYTES = 32 * 2**20

OPENAI = Adapter(
    routes=routes.router.routes,
    prefix=routes.PREFIX,
    envelope=refused,
    body_limits={"": JSON_BYTES},
)
