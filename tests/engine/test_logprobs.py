"""Chunked log-probabilities against the whole [T, V] array, with and without a trained head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.conftest import DEVICE, VOCAB, sequences
from weaver.engine.torch.logprobs import Queries, target_scores
from weaver.engine.torch.lora import Adapter, LoraPair
from weaver.engine.torch.memory import CHUNK_ELEMENTS
from weaver.engine.torch.packing import pack

if TYPE_CHECKING:
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.models import Head
    from weaver.engine.torch.packing import PackedBatch


def head_adapter(head: Head, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a = (
        torch.randn(3, head.linear.in_features, generator=generator)
        .mul(0.2)
        .to(DEVICE)
        .requires_grad_()
    )
    b = (
        torch.randn(head.linear.out_features, 3, generator=generator)
        .mul(0.2)
        .to(DEVICE)
        .requires_grad_()
    )
    return Adapter({head.path: LoraPair(a, b)}, 0.5)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize(
    "trained", [(False, False, False), (True, True, True), (True, False, True)]
)
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_values_and_gradients_equal_the_whole_array(
    store: ModelStore,
    architecture: str,
    trained: tuple[bool, ...],
    entropy_gradient: bool,
    masked: bool,
    chunked: bool,
) -> None:
    model = store.base(architecture)
    adapters = [head_adapter(model.head, i) if on else None for i, on in enumerate(trained)]
    batch = pack(sequences(20, 7, 25), adapters=adapters, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(52, 32, generator=generator).to(DEVICE).requires_grad_()
    active = (torch.rand(52, generator=generator) < (0.6 if masked else 2)).to(DEVICE)
    queries = Queries(
        targets=batch.input_ids.flip(0),
        temperature=torch.linspace(0.5, 1.5, 52, device=DEVICE),
        active=active,
    )
    scores = target_scores(
        model,
        hidden,
        batch,
        queries=queries,
        chunk=16 * VOCAB if chunked else CHUNK_ELEMENTS,
        entropy=True,
        entropy_gradient=entropy_gradient,
    )
    assert scores.entropy is not None
    expected_lp, expected_entropy = whole_array(model.head, hidden, batch, queries)
    torch.testing.assert_close(scores.logprobs, expected_lp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    assert scores.entropy.requires_grad == entropy_gradient
    upstream = torch.randn(52, generator=generator).to(DEVICE) * active
    inputs = [hidden, *(p for a in adapters if a is not None for p in a.tensors().values())]
    ours = torch.autograd.grad(_total(scores.logprobs, scores.entropy, upstream), inputs)
    if not entropy_gradient:
        expected_entropy = expected_entropy.detach()
    theirs = torch.autograd.grad(_total(expected_lp, expected_entropy, upstream), inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) < 1e-5 * float(other.norm())


def _total(lp: torch.Tensor, entropy: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    return (upstream * (lp + 0.5 * entropy)).sum()


def whole_array(
    head: Head, hidden: torch.Tensor, batch: PackedBatch, queries: Queries
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for h, adapter in zip(hidden.split(batch.lengths), batch.adapters, strict=True):
        weight = head.linear.weight
        if adapter is not None:
            pair = adapter.pairs[head.path]
            weight = weight + adapter.scale * pair.b @ pair.a
        rows.append(h @ weight.T)
    z = torch.cat(rows)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    log_p = torch.log_softmax(z / queries.temperature[:, None], -1)
    return log_p[range(len(z)), queries.targets], -(log_p.exp() * log_p).sum(-1)


def test_without_gradients_nothing_is_kept(store: ModelStore) -> None:
    model = store.base("qwen3")
    batch = pack(sequences(9), adapters=[None], device=DEVICE)
    queries = Queries(
        targets=batch.input_ids,
        temperature=torch.ones(9, device=DEVICE),
        active=torch.ones(9, dtype=torch.bool, device=DEVICE),
    )
    with torch.no_grad():
        hidden = model.hidden_states(batch)
        scores = target_scores(
            model, hidden, batch, queries=queries, chunk=CHUNK_ELEMENTS, entropy=False
        )
    assert not scores.logprobs.requires_grad
    assert scores.entropy is None
