"""Logits as real models spread them over large vocabularies, and what is exact of them."""

from __future__ import annotations

import torch

BOUND = 2e-5
ROWS = 5
SPREADS = ("equal", "wide", "sharp", "shifted")


def logits_of(spread: str, vocab_size: int) -> torch.Tensor:
    """float32 [ROWS, V]; those of real models have a deviation of 4 or more and reach 40."""
    generator = torch.Generator().manual_seed(vocab_size)
    z = torch.randn(ROWS, vocab_size, generator=generator)
    if spread == "equal":
        return z * 1e-3
    if spread == "sharp":
        z[:, 3] += 10
    return z * 4 - (0 if spread != "shifted" else 40)


def exact(z: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    return (z.double() / temperature).log_softmax(-1)
