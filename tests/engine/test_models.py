"""Packed logits and LoRA gradients against transformers and PEFT, over eight architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tests.engine.conftest import VOCAB, reference_model
from weaver.engine.packing import pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.models import LoadedModel

CPU = torch.device("cpu")


def sequences(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def test_packed_logits_equal_those_of_transformers(
    architecture: str,
    loaded: Callable[[str], LoadedModel],
    model_folder: Callable[[str], Path],
) -> None:
    model, reference = loaded(architecture), reference_model(model_folder(architecture))
    tokens = sequences(3, 3, 1, 17, 9, 9, 9)
    batch = pack(tokens, adapters=[None] * len(tokens), device=CPU)
    ours = model.logits(model.hidden_states(batch), [None] * sum(batch.lengths))
    theirs = torch.cat([reference(torch.tensor([s])).logits[0] for s in tokens])
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
