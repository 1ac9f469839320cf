"""What callers from afar are told of checkpoints: all but their folders. `View` asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver.protocol import CheckpointLoaded, CheckpointSaved

if TYPE_CHECKING:
    from weaver.protocol import Outcome
    from weaver.types import CheckpointInfo


def told(outcome: Outcome) -> Outcome:
    match outcome.result:
        case CheckpointSaved() | CheckpointLoaded() as result:
            shown = result.model_copy(update={"checkpoint": bare(result.checkpoint)})
            return outcome.model_copy(update={"result": shown})
    return outcome


def bare(checkpoint: CheckpointInfo) -> CheckpointInfo:
    return checkpoint.model_copy(update={"folder": None})
