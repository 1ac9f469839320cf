"""Who asks: the rights that come with a request, and that its session and operations keep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. An admin sees every project, and creates in its own."""

    project: str
    admin: bool = False
    local: bool = False
    """In this process: may name folders of this machine, and is told them."""


OWNER = Caller("default", admin=True, local=True)
"""Of a service that is not shared."""
