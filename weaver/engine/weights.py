"""`PublishedWeights`: what `TorchSampler` samples from under one id. Never changes once made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver.engine.lora import adapter_from_tensors
from weaver.engine.models import check_finite

if TYPE_CHECKING:
    from weaver.engine.base import WeightSnapshot
    from weaver.engine.lora import Adapter
    from weaver.engine.models import LoadedModel
    from weaver.engine.store import ModelStore


@dataclass(frozen=True, slots=True, eq=False)
class PublishedWeights:
    model: LoadedModel
    """The shared base, or the snapshot's own copy after full fine-tuning."""
    adapter: Adapter | None
    version: int


def publish_snapshot(snapshot: WeightSnapshot, *, store: ModelStore) -> PublishedWeights:
    """The snapshot on its base model.

    Raises:
        UnknownModelError, UnsupportedError: the base model cannot be loaded.
        NonFiniteError: a weight is NaN or infinite.
        CheckpointMismatchError: the weights of a whole model do not fit.
    """
    check_finite(snapshot.tensors)
    base = store.base(snapshot.base_model)
    if snapshot.lora_config is None:
        return PublishedWeights(base.with_weights(snapshot.tensors), None, snapshot.version)
    scale = snapshot.lora_config.alpha / snapshot.lora_config.rank
    adapter = adapter_from_tensors(snapshot.tensors, scale=scale, device=base.device)
    return PublishedWeights(base, adapter, snapshot.version)
