"""`Adapter`: one wire format on the server, with all that differs from one to the next.

Each is a value beside its routes; `create_app` mounts any number of them, also below one prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.routing import Match

from weaver.server.http.errors import add_error_handlers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.routing import BaseRoute
    from starlette.types import Scope

    from weaver.server.http.errors import Envelope


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """Routes, and what holds for every request that is theirs.

    Args:
        routes: with their whole paths.
        prefix: with which their paths begin. What nobody has a route for belongs to the adapter
            with the longest prefix of it, and among equals to the one that was mounted first.
        envelope: makes the answer to a request that is refused.
        body_limits: the most bytes of a body, by its media type; "" is any other, and None is as
            many as the server takes.
        open_paths: need no key; one that ends with `*` stands for all that begin so, which are not
            written to the log, as they may be secrets.
    """

    routes: Sequence[BaseRoute]
    prefix: str
    envelope: Envelope
    body_limits: Mapping[str, int | None]
    open_paths: tuple[str, ...] = ()

    @cached_property
    def app(self) -> FastAPI:
        """The application of these routes alone; made once for all servers of a process."""
        app = FastAPI(routes=[*self.routes], openapi_url=None, redirect_slashes=False)
        add_error_handlers(app)
        return app

    def match(self, scope: Scope) -> Match:
        """How well its best route fits the request: wholly, but for the method, or not at all."""
        best = Match.NONE
        for route in self.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return match
            best = max(best, match, key=lambda one: one.value)
        return best

    def body_limit(self, media_type: str) -> int | None:
        kind = media_type.partition(";")[0].strip()
        return self.body_limits[kind if kind in self.body_limits else ""]

    def opens(self, path: str) -> bool:
        return path in self.open_paths or self.hides(path)

    def hides(self, path: str) -> bool:
        """Whether the path may be a secret."""
        return path.startswith(tuple(one[:-1] for one in self.open_paths if one.endswith("*")))
