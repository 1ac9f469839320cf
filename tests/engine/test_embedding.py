"""A tied embedding that reads its rows from the head's packed weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from tests.engine.conftest import GEMMA, SIZES, of_the_cpu, reference_model, save_tiny, sequences
from weaver.engine.torch import kernels
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.embedding import SharedEmbedding
from weaver.engine.torch.kernels import Prepacked, prepackable
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.packing import pack

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.engine.torch.models import LoadedModel

pytestmark = [
    of_the_cpu,
    pytest.mark.skipif(not prepackable(torch.float32), reason="oneDNN packs nothing here"),
]
LARGE: dict[str, Any] = {**SIZES, "vocab_size": 4099, "tie_word_embeddings": True}
"""Large enough to be packed, and no multiple of any block."""


def loaded(folder: Path, *, tied: bool = True) -> LoadedModel:
    """Gemma multiplies its embedding by the root of the hidden size."""
    sizes = {**LARGE, **GEMMA, "tie_word_embeddings": tied}
    save_tiny(transformers.Gemma3TextConfig(**sizes), folder)
    catalog = Catalog({"base": folder}, allow_paths=False)
    device = torch.device("cpu")
    return ModelStore(catalog, device=device, dtype=torch.float32, threads=1).base("base")


@pytest.mark.parametrize("shape", [(4099, 32), (4096, 64), (2051, 100), (2050, 65)])
def test_rows_of_a_packed_weight_are_the_weights_own(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kernel = Prepacked(weight)
    assert kernel.read_rows(weight)
    assert torch.equal(kernel.rows(torch.arange(shape[0])), weight)
    assert torch.equal(kernel.rows(torch.tensor([5, 5, 0])), weight[[5, 5, 0]])


@torch.no_grad()
def test_a_tied_embedding_is_the_heads_weight_and_exactly_what_it_was(tmp_path: Path) -> None:
    model, reference = loaded(tmp_path), reference_model(tmp_path)
    embedding = model.module.get_input_embeddings()
    assert isinstance(embedding, SharedEmbedding)
    ids = torch.arange(LARGE["vocab_size"]).view(1, -1)
    assert torch.equal(embedding(ids), reference.get_input_embeddings()(ids))
    values = sum(p.numel() for p in model.module.parameters())
    assert values < LARGE["vocab_size"] * LARGE["hidden_size"]
    tokens = sequences(9)[0]
    hidden = model.hidden_states(pack([tokens], adapters=[None], device=model.device))
    theirs = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(model.logits(hidden, [None] * 9), theirs, atol=5e-5, rtol=0)


def test_a_layout_that_is_not_known_leaves_the_embedding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_blocks_of", lambda packed, weight: None)
    assert isinstance(loaded(tmp_path).module.get_input_embeddings(), torch.nn.Embedding)


def test_an_embedding_of_its_own_stays(tmp_path: Path) -> None:
    embedding = loaded(tmp_path, tied=False).module.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
