"""`Parts`: what a service is made of; `LocalService` makes it, and each `View` has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from weaver.engine.base import Engine
    from weaver.server.activity import Activity
    from weaver.server.checkpoints import Checkpoints
    from weaver.server.executor import Executor
    from weaver.server.exports import Exports
    from weaver.server.imports import Imports
    from weaver.server.intake import Intake
    from weaver.server.journal import Journal
    from weaver.server.registry import Registry
    from weaver.server.settings import Limits
    from weaver.types import ModelInfo


@dataclass(slots=True, eq=False, kw_only=True)
class Parts:
    """What a service is made of, and all views of it share."""

    engine: Engine
    store: Journal
    checkpoints: Checkpoints
    live: Checkpoints
    """Snapshots of runs, and samplers without a name."""
    exports: Exports
    imports: Imports
    executor: Executor
    intake: Intake
    registry: Registry
    activity: Activity
    limits: Limits
    deterministic: bool
    now: Callable[[], datetime]
    opening: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while a session is counted and written down."""
    closed: bool = True
    models: Sequence[ModelInfo] | None = None
    """An engine's list is made when the engine is."""
