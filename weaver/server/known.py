"""`Known`: the runs and sessions that a service has, shared by all of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weaver.server.runs import Run
    from weaver.server.sessions import Session


@dataclass(frozen=True, slots=True)
class Known:
    runs: dict[str, Run] = field(default_factory=dict)
    """The engine's thread may add one at any time."""
    owners: dict[str, str] = field(default_factory=dict)
    """The project of each run, of deleted ones too: their checkpoints may remain."""
    sessions: dict[str, Session] = field(default_factory=dict)
    """The open ones."""
