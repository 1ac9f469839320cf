"""`SharedEmbedding`: a tied embedding that reads its rows from the packed weight of the head.

So the largest matrix of a small model is in memory once. `LoadedModel` puts it in, where the head's
kernel has rows that can be read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from weaver.engine.torch.kernels import Prepacked


class SharedEmbedding(torch.nn.Module):
    """What `embedding` computes, with whatever its class does behind the look-up."""

    def __init__(self, embedding: torch.nn.Embedding, kernel: Prepacked) -> None:
        super().__init__()
        nothing = embedding.weight.new_empty(0, embedding.embedding_dim)
        embedding.weight = torch.nn.Parameter(nothing, requires_grad=False)
        embedding.padding_idx = None  # it only stops gradients
        self._embedding = embedding
        self._kernel = kernel

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., H]"""
        rows = self._kernel.rows(ids.reshape(-1))
        each = torch.arange(len(rows)).view(ids.shape)
        out: torch.Tensor = functional_call(self._embedding, {"weight": rows}, (each,))
        return out


def share_embedding(module: Any, kernel: object) -> None:
    """Replaces the embedding of a frozen model whose head has the same weight, kept by `kernel`."""
    embedding = module.get_input_embeddings()
    if (
        isinstance(kernel, Prepacked)
        and isinstance(embedding, torch.nn.Embedding)
        and embedding.max_norm is None
        and kernel.read_rows(embedding.weight.detach())
    ):
        module.set_input_embeddings(SharedEmbedding(embedding, kernel))
