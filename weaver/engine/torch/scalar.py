"""The scalar head: one number a sequence, from the hidden state of its last token.

`TorchTrainer` and `Reader` score with it. T rows of a batch, D sequences, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForSequenceClassification

from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.packing import PackedBatch


def check_scalar(facts: ModelFacts) -> None:
    """Raises UnsupportedError: nobody else could read such a model of this architecture."""
    if type(facts.config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedError(
            f"transformers has no sequence classification of {facts.info.architecture}.",
            field="head",
            hint="Train the reward model on another base.",
        )


def scalar_settings(facts: ModelFacts) -> dict[str, object]:
    """What config.json says of such a model beside what it says of the base."""
    cls = AutoModelForSequenceClassification._model_mapping[type(facts.config)]
    names = {"architectures": [cls.__name__]}
    return {**names, "id2label": {"0": "score"}, "label2id": {"score": 0}}


def sequence_scores(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """float32 [D] of hidden states [T, H], each by the head of its sequence's adapter."""
    ends = torch.tensor(batch.lengths, device=hidden.device).cumsum(0) - 1
    return last_scores(hidden[ends], [adapter.score for adapter in batch.adapters if adapter])


def last_scores(last: torch.Tensor, heads: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """float32 [D] of the hidden states of last tokens [D, H], by heads [1, H]; none is missing."""
    weights = torch.cat([head for head in heads if head is not None])
    return (last.float() * weights).sum(-1)
