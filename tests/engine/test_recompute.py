"""Gradients where layers compute their activations again, against those where they keep them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.conftest import lora_config, sequences
from weaver.engine.torch.lora import new_adapter
from weaver.engine.torch.packing import PackedBatch, pack
from weaver.engine.torch.recompute import recomputed
from weaver.errors import EngineError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from weaver.engine.torch.lora import Adapter
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.models import LoadedModel

LENGTHS = (17, 9, 9, 30)


def adapter_of(model: LoadedModel, config: LoraConfig, seed: int) -> Adapter:
    """Of values that all have a gradient."""
    targets = list(model.facts.targets.values())
    adapter = new_adapter(targets, config, seed=seed, device=model.device)
    for pair in adapter.pairs.values():
        generator = torch.Generator().manual_seed(seed)
        pair.b.data.copy_(torch.randn(pair.b.shape, generator=generator) * 0.1)
    return adapter


def tenants(model: LoadedModel, config: LoraConfig) -> list[Adapter | None]:
    """One of two sequences, one of another rank, and the base."""
    first = adapter_of(model, config, 1)
    return [first, first, adapter_of(model, config.model_copy(update={"rank": 7}), 2), None]


def batch_of(model: LoadedModel, adapters: list[Adapter | None]) -> PackedBatch:
    rows = [[t % model.info.vocab_size for t in row] for row in sequences(*LENGTHS)]
    return pack(rows, adapters=adapters, device=model.device)


def gradients(
    model: LoadedModel, adapters: list[Adapter | None], *, recompute: int
) -> list[torch.Tensor]:
    """Those of all that is trained, behind the hidden states."""
    trained = [t for a in {id(a): a for a in adapters if a}.values() for t in a.tensors().values()]
    hidden = model.hidden_states(batch_of(model, adapters), recompute=recompute)
    loss = hidden.float().pow(2).sum()
    parts = torch.autograd.grad(
        loss, trained or list(model.module.parameters()), materialize_grads=True
    )
    return [hidden.detach(), *parts]


@pytest.mark.parametrize("recompute", [1, 2])
def test_gradients_of_merged_tenants_are_equal_bit_for_bit(
    store: ModelStore, architecture: str, recompute: int
) -> None:
    model = store.base(architecture)
    adapters = tenants(model, lora_config(architecture))
    kept = gradients(model, adapters, recompute=0)
    again = gradients(model, adapters, recompute=recompute)
    assert all(map(torch.equal, kept, again)) and any(part.any() for part in kept[1:])


def test_gradients_of_a_whole_model_are_equal_bit_for_bit(
    store: ModelStore, architecture: str
) -> None:
    model = store.own(architecture)
    kept, some, all_ = (gradients(model, [None] * 4, recompute=k) for k in (0, 1, 2))
    assert all(map(torch.equal, kept, some)) and all(map(torch.equal, kept, all_))


def test_the_bundled_model_is_no_exception(store: ModelStore) -> None:
    model = store.base("weaver-nano")
    adapters = tenants(model, LoraConfig(rank=4))
    kept = gradients(model, adapters, recompute=0)
    for recompute in range(1, model.facts.num_layers + 1):
        again = gradients(model, adapters, recompute=recompute)
        assert all(map(torch.equal, kept, again))


def test_each_layer_that_computes_again_keeps_less(store: ModelStore) -> None:
    model = store.base("weaver-nano")
    batch = batch_of(model, tenants(model, LoraConfig(rank=4)))

    def kept_bytes(recompute: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.hidden_states(batch, recompute=recompute)
        assert hidden.requires_grad
        return sum(kept.values())

    sizes = [kept_bytes(k) for k in range(model.facts.num_layers + 1)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 3, sizes


def test_what_is_not_set_up_again_is_missed(store: ModelStore) -> None:
    """The control: the adapters of the rows are gone when the backward pass comes."""
    model = store.base("qwen3")
    adapters = tenants(model, lora_config("qwen3"))
    with recomputed(model._layers, nullcontext):
        hidden = model.hidden_states(batch_of(model, adapters))
    with pytest.raises(EngineError, match="the routing has None"):
        hidden.sum().backward()


def test_a_pass_without_gradient_is_as_before(store: ModelStore) -> None:
    model = store.base("qwen3")
    batch = batch_of(model, tenants(model, lora_config("qwen3")))
    with torch.inference_mode():
        assert torch.equal(model.hidden_states(batch, recompute=2), model.hidden_states(batch))
