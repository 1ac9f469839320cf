"""`Adapter`: one wire format on the server, with all that differs from one to the next.

Each is a value beside its routes; `create_app` mounts any number of them, also below one prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.server.http.errors import Envelope

Found = tuple[Match, BaseRoute | None, Scope]
"""How well a route fits, the route, and what it adds to the scope."""


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

    def match(self, scope: Scope) -> Found:
        """Its best route for the request: one for the method, too, or else for the path."""
        best: Found = Match.NONE, None, {}
        for route in self.routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                return match, route, child_scope
            if match is Match.PARTIAL and best[1] is None:
                best = match, route, child_scope
        return best

    def body_limit(self, media_type: str) -> int | None:
        kind = media_type.partition(";")[0].strip()
        return self.body_limits[kind if kind in self.body_limits else ""]

    def opens(self, path: str) -> bool:
        return path in self.open_paths or self.hides(path)

    def hides(self, path: str) -> bool:
        """Whether the path may be a secret."""
        return path.startswith(self._hidden)

    @cached_property
    def _hidden(self) -> tuple[str, ...]:
        return tuple(one[:-1] for one in self.open_paths if one.endswith("*"))
