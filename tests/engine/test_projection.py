"""Several frozen layers as one product, and several adapters in one product."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from tests.engine.conftest import DEVICE, LORA, SIZES, save_tiny
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.linear import FrozenLinear, Projection
from weaver.engine.torch.lora import Adapter, LoraPair, adapter_from_tensors
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.routing import STACKED_ROWS, Routing
from weaver.engine.torch.trainer import TorchTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SMALL, LARGE = (24, (16, 8, 8)), (512, (512, 256, 256))
"""in, and out of each layer."""
PATHS = ("q", "k", "v")


class Siblings:
    """Three plain layers, and frozen ones with their weights; only the second has no bias."""

    def __init__(self, sizes: tuple[int, tuple[int, ...]]) -> None:
        torch.manual_seed(0)
        width, outs = sizes
        plain = [torch.nn.Linear(width, out, bias=i != 1).to(DEVICE) for i, out in enumerate(outs)]
        self.weights = [layer.weight.detach() for layer in plain]
        self.biases = [layer.bias for layer in plain]
        self.routing = Routing()
        self.projection = Projection(plain, paths=PATHS)
        self.frozen = [FrozenLinear(self.projection, i, routing=self.routing) for i in range(3)]
        self.width, self.outs = sizes

    def expected(
        self, x: torch.Tensor, lengths: Sequence[int], adapters: Sequence[Adapter | None]
    ) -> list[torch.Tensor]:
        """Each layer's output by plain products with the adapters' own matrices."""
        ys: list[torch.Tensor] = []
        for path, weight, bias in zip(PATHS, self.weights, self.biases, strict=True):
            pieces: list[torch.Tensor] = []
            for rows, adapter in zip(x.split(list(lengths)), adapters, strict=True):
                pair = None if adapter is None else adapter.pairs.get(path)
                update = 0 if adapter is None or pair is None else adapter.scale * pair.b @ pair.a
                pieces.append(linear(rows, weight + update, bias))
            ys.append(torch.cat(pieces))
        return ys


def tensors_of(
    layers: Siblings, *, seed: int, rank: int, paths: Sequence[str] = PATHS
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        out = layers.outs[PATHS.index(path)]
        for name, shape in (("A", (rank, layers.width)), ("B", (out, rank))):
            values = torch.randn(shape, generator=generator) * 0.1
            tensors[f"base_model.model.{path}.lora_{name}.weight"] = values
    return tensors


def frozen_adapter(
    layers: Siblings, *, seed: int, rank: int = 3, paths: Sequence[str] = PATHS
) -> Adapter:
    config = LORA.model_copy(update={"rank": rank, "alpha": 0.7 * rank})
    tensors = tensors_of(layers, seed=seed, rank=rank, paths=paths)
    return adapter_from_tensors(tensors, config, device=DEVICE)


def trained(adapter: Adapter) -> Adapter:
    """The same values, to be trained, and not side by side in memory."""
    pairs: Mapping[str, LoraPair] = {
        path: LoraPair(p.a.clone().requires_grad_(), p.b.clone().requires_grad_())
        for path, p in adapter.pairs.items()
    }
    return Adapter(pairs, adapter.scale)


def input_of(layers: Siblings, rows: int) -> torch.Tensor:
    return torch.randn(rows, layers.width, generator=torch.Generator().manual_seed(7)).to(DEVICE)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("lengths", [(9,), (4, 4, 4), (1, 6, 2), (70, 3, 1)])
def test_values_and_gradients_equal_plain_autograd(
    sizes: tuple[int, tuple[int, ...]], lengths: tuple[int, ...]
) -> None:
    layers = Siblings(sizes)
    made = [
        trained(frozen_adapter(layers, seed=1)),
        None,
        trained(frozen_adapter(layers, seed=2, rank=5, paths=("q", "v"))),
    ]
    adapters = made[: len(lengths)]
    x = input_of(layers, sum(lengths)).requires_grad_()
    with layers.routing.of(lengths, adapters):
        ys = [layer(x[None])[0] for layer in layers.frozen]
        again = [layer(x[None])[0] for layer in layers.frozen]
    expected = layers.expected(x, lengths, adapters)
    upstream = [torch.randn_like(y) for y in ys]
    inputs = [x] + [t for a in adapters if a is not None for t in a.tensors().values()]
    ours, theirs = (torch.autograd.grad(of, inputs, upstream) for of in (ys, expected))
    for mine, other in zip([*ys, *again], [*expected, *expected], strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm()) < 1e-5 * float(other.norm())


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("lengths", [(9,), (4, 4, 4), (1, 3, 2), (STACKED_ROWS + 1, 20, 20)])
@pytest.mark.parametrize("with_base", [False, True])
def test_frozen_adapters_of_other_ranks_and_layers_share_products(
    sizes: tuple[int, tuple[int, ...]], lengths: tuple[int, ...], with_base: bool
) -> None:
    layers = Siblings(sizes)
    made = [
        frozen_adapter(layers, seed=1),
        frozen_adapter(layers, seed=2, rank=5, paths=("q", "v")),
        None if with_base else frozen_adapter(layers, seed=3, rank=1, paths=("v",)),
    ]
    adapters = made[: len(lengths)]
    x = input_of(layers, sum(lengths))
    with torch.inference_mode():
        for _ in range(2):
            with layers.routing.of(lengths, adapters):
                ys = [layer(x) for layer in layers.frozen]
            for mine, other in zip(ys, layers.expected(x, lengths, adapters), strict=True):
                torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


def test_a_row_alone_has_the_answer_of_a_batch() -> None:
    layers = Siblings(LARGE)
    adapters = [frozen_adapter(layers, seed=seed) for seed in range(4)]
    x = input_of(layers, 8)
    with torch.inference_mode():
        with layers.routing.of([2] * 4, adapters):
            together = [layer(x) for layer in layers.frozen]
        for row in range(8):
            with layers.routing.of([1], adapters[row // 2 : row // 2 + 1]):
                alone = [layer(x[row : row + 1]) for layer in layers.frozen]
            for one, all_ in zip(alone, together, strict=True):
                torch.testing.assert_close(one[0], all_[row], atol=2e-5, rtol=1e-5)


def test_products_of_several_adapters_follow_which_they_are() -> None:
    layers = Siblings(SMALL)
    adapters = [frozen_adapter(layers, seed=seed) for seed in range(3)]
    x = input_of(layers, 4)
    for some in ([0, 1], [1, 2], [2, 1], [0, 1]):
        chosen = [adapters[i] for i in some]
        with torch.no_grad(), layers.routing.of([2, 2], chosen):
            y = layers.frozen[0](x)
        torch.testing.assert_close(y, layers.expected(x, [2, 2], chosen)[0])


def test_adapters_that_are_no_more_leave_no_copies() -> None:
    layers = Siblings(SMALL)
    adapters = [frozen_adapter(layers, seed=seed) for seed in range(2)]
    with torch.no_grad(), layers.routing.of([2, 2], adapters):
        layers.frozen[0](input_of(layers, 4))
    stacks = layers.routing._stacks
    assert stacks._stacks
    adapters.pop()
    gc.collect()
    assert not stacks._stacks


def test_changed_values_of_adapters_in_training_count_at_once() -> None:
    layers = Siblings(SMALL)
    adapters = [trained(frozen_adapter(layers, seed=seed)) for seed in range(2)]
    x = input_of(layers, 4)
    for _ in range(2):
        with torch.no_grad(), layers.routing.of([2, 2], adapters):
            ys = [layer(x) for layer in layers.frozen]
        for mine, other in zip(ys, layers.expected(x, [2, 2], adapters), strict=True):
            torch.testing.assert_close(mine, other)
        with torch.no_grad():
            for adapter in adapters:
                for tensor in adapter.tensors().values():
                    tensor.mul_(1.5)


@pytest.mark.parametrize("gradient", [False, True])
def test_layers_may_be_called_with_other_inputs_or_not_at_all(gradient: bool) -> None:
    layers = Siblings(SMALL)
    adapters = [trained(frozen_adapter(layers, seed=1))]
    x, other = input_of(layers, 5), input_of(layers, 5) + 1
    q, k, v = layers.frozen
    right, right_of_other = (layers.expected(each, [5], adapters) for each in (x, other))
    with torch.set_grad_enabled(gradient), layers.routing.of([5], adapters):
        for layer, given, expected in (
            (q, x, right[0]),
            (k, other, right_of_other[1]),
            (v, x, right[2]),
            (v, x, right[2]),
            (v, x.clone(), right[2]),
            (k, x, right[1]),
        ):
            torch.testing.assert_close(layer(given), expected)


def test_what_is_kept_for_other_layers_goes_with_the_call() -> None:
    layers = Siblings(SMALL)
    x = input_of(layers, 5)
    kept: list[weakref.ref[torch.Tensor]] = []
    with layers.routing.of([5], [None]):
        given = x * 2
        kept.append(weakref.ref(given))
        layers.frozen[0](given)
        del given
        assert kept[0]() is not None
    assert kept[0]() is None
    with layers.routing.of([5], [None]):
        given = x * 2
        kept.append(weakref.ref(given))
        for layer in layers.frozen:
            layer(given)
        del given
        assert kept[1]() is None


def test_outputs_may_be_changed_in_place() -> None:
    layers = Siblings(LARGE)
    adapters = [trained(frozen_adapter(layers, seed=1))]
    x = input_of(layers, 5).requires_grad_()
    with layers.routing.of([5], adapters):
        ys = [layer(x).clamp_(-0.5, 0.5) for layer in layers.frozen]
    expected = [y.clamp(-0.5, 0.5) for y in layers.expected(x, [5], adapters)]
    ours, theirs = (torch.autograd.grad(torch.cat(y, 1).sum(), x)[0] for y in (ys, expected))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_have_the_same_gradients(reentrant: bool) -> None:
    layers = Siblings(LARGE)
    adapter = trained(frozen_adapter(layers, seed=1))
    x = input_of(layers, 5).requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        with layers.routing.of([5], [adapter]):
            q, k, v = (layer(x) for layer in layers.frozen)
            return torch.tanh(q[:, :256] * k + v)

    gradients: list[list[torch.Tensor | None]] = []
    for y in (block(x), checkpoint(block, x, use_reentrant=reentrant)):
        y.sum().backward()
        inputs = [x, *adapter.tensors().values()]
        gradients.append([tensor.grad for tensor in inputs])
        for tensor in inputs:
            tensor.grad = None
    for kept, again in zip(*gradients, strict=True):
        assert kept is not None and again is not None
        assert torch.equal(kept, again)


def model_of(folder: Path, config: transformers.PreTrainedConfig) -> LoadedModel:
    save_tiny(config, folder)
    catalog = Catalog({"base": folder}, allow_paths=False)
    store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
    return store.base("base")


def joined(model: LoadedModel) -> set[tuple[str, ...]]:
    """The names of layers of one product."""
    layers = [m for m in model.module.modules() if isinstance(m, FrozenLinear)]
    names = {tuple(p.rpartition(".")[2] for p in layer.projection.paths) for layer in layers}
    return {each for each in names if len(each) > 1}


def test_siblings_of_one_input_are_found_in_a_model(tmp_path: Path) -> None:
    model = model_of(tmp_path, transformers.Qwen3Config(**SIZES))
    assert joined(model) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}


def test_layers_whose_input_differs_or_changes_stay_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = transformers.models.qwen3.modeling_qwen3.Qwen3MLP

    def changes(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        gate = self.gate_proj(x)
        return self.down_proj(torch.sigmoid(gate) * self.up_proj(x.mul_(2)))

    monkeypatch.setattr(mlp, "forward", changes)
    model = model_of(tmp_path / "changes", transformers.Qwen3Config(**SIZES))
    assert joined(model) == {("q_proj", "k_proj", "v_proj")}

    def differs(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x + 0))

    monkeypatch.setattr(mlp, "forward", differs)
    model = model_of(tmp_path / "differs", transformers.Qwen3Config(**SIZES))
    assert joined(model) == {("q_proj", "k_proj", "v_proj")}


def test_the_matrices_of_siblings_lie_side_by_side(tmp_path: Path) -> None:
    save_tiny(transformers.Qwen3Config(**SIZES), tmp_path)
    catalog = Catalog({"base": tmp_path}, allow_paths=False)
    store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
    trainer = TorchTrainer(store)
    trainer.create_run("run", "base", training_mode="lora", lora_config=LORA, seed=0)
    adapter = trainer._runs["run"].adapter
    published = store.publish(trainer.snapshot("run")).adapter
    assert adapter is not None and published is not None
    names = ("q_proj", "k_proj", "v_proj")
    paths = tuple(f"model.layers.0.self_attn.{name}" for name in names)
    for each in (adapter, published):
        block = each.block(paths)
        assert block is not None
        assert block.a_t().data_ptr() == each.pairs[paths[0]].a.data_ptr()
        assert torch.equal(block.a_t().t(), torch.cat([each.pairs[p].a for p in paths]))
