"""What passes are planned to hold, against what autograd keeps; and how plans follow memory."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.conftest import datum, gradient_of, job, new_run, result_of, sequences
from tests.zoo import FAMILIES
from tests.zoo.models import random_model
from weaver.config import Settings
from weaver.engine.torch.attention import BLOCK_ROWS
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.linear import FrozenLinear
from weaver.engine.torch.lora import new_adapter
from weaver.engine.torch.memory import (
    CHUNK_ELEMENTS,
    FEWEST_TOKENS,
    MOST_CHUNK_ELEMENTS,
    MOST_TOKENS,
    TOKENS_PER_PASS,
    Footprint,
    full_training_bytes,
    make_plan,
)
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.packing import pack
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import RunNotFoundError, UnsupportedError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.engine.torch.memory import Plan
    from weaver.engine.torch.models import LoadedModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FACTOR = 2.4
"""The estimate is at least what is kept, and at most so many times that."""
LENGTHS = (64, 64, 32)
MIXTURES, CAPPED = ["qwen3_moe", "mixtral"], ["gemma2", "gpt_oss"]
MEASURED = ["llama", "qwen3", "gemma3", "phi", "olmo2", "gpt_neox", "opt", *MIXTURES, *CAPPED]


def kept_bytes(model: LoadedModel, *, recompute: int) -> int:
    """What autograd keeps of a pass, beside weights, adapters and the inputs of layers."""
    targets = list(model.facts.targets.values())
    adapter = new_adapter(targets, LoraConfig(rank=1), seed=0, device=CPU)
    frozen = [m.weight for m in model.module.modules() if isinstance(m, FrozenLinear)]
    there = [*model.module.parameters(), *model.module.buffers(), *frozen]
    known = {t.untyped_storage().data_ptr() for t in [*there, *adapter.tensors().values()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = [[t % model.info.vocab_size for t in row] for row in sequences(*LENGTHS)]
    adapters = [None if model.trainable else adapter] * len(rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden_states(pack(rows, adapters=adapters, device=CPU), recompute=recompute)
    assert hidden.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MEASURED)
def test_activations_are_within_a_factor_of_what_is_kept(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8}
    sizes |= {"ffn_dim": 352} if family == "opt" else {}
    random_model(family, vocab_size=64, **sizes).to(dtype).save_pretrained(tmp_path)
    catalog = Catalog({family: tmp_path}, allow_paths=False)
    store = ModelStore(catalog, device=CPU, dtype=dtype, threads=1)
    for model in (store.base(family), store.own(family)):
        layers, footprint = 2, Footprint.of(model.facts, itemsize=model.dtype.itemsize, chunk=1)
        kept = kept_bytes(model, recompute=0) - kept_bytes(model, recompute=layers)
        reckoned = footprint.size(LENGTHS, recompute=0) - footprint.size(LENGTHS, recompute=layers)
        assert kept < reckoned < FACTOR * kept, (reckoned / kept, model.trainable)
    assert family in FAMILIES


def plan_of(catalog: Catalog, passes: int | None, **how: object) -> Plan:
    settings = {"itemsize": 4, "device": CPU, **how}
    return make_plan(catalog.facts("llama"), passes=passes, **settings)  # type: ignore[arg-type]


def test_where_memory_is_plenty_or_not_known(catalog: Catalog) -> None:
    for passes in (None, 10**12):
        plan = plan_of(catalog, passes)
        assert (plan.tokens, plan.footprint.chunk) == (TOKENS_PER_PASS, CHUNK_ELEMENTS)
        assert plan.layers_recomputed([4096]) == 0
        assert plan.longest == (None if passes is None else 256)  # the context
    plenty = plan_of(catalog, 10**12, device=CUDA)
    assert (plenty.tokens, plenty.footprint.chunk) == (MOST_TOKENS, MOST_CHUNK_ELEMENTS)
    unknown = plan_of(catalog, None, device=CUDA)
    assert (unknown.tokens, unknown.footprint.chunk) == (TOKENS_PER_PASS, CHUNK_ELEMENTS)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_less_memory_makes_passes_smaller_then_layers_compute_again(
    catalog: Catalog, device: torch.device
) -> None:
    plans = [plan_of(catalog, 2**power, device=device) for power in range(36, 10, -1)]
    again = [plan.layers_recomputed([plan.tokens]) for plan in plans]
    for (before, after), (few, more) in zip(pairwise(plans), pairwise(again), strict=True):
        assert before.tokens >= after.tokens and before.footprint.chunk >= after.footprint.chunk
        assert (before.longest or 0) >= (after.longest or 0)
        assert before.tokens < FEWEST_TOKENS or few <= more
    for plan, layers in zip(plans, again, strict=True):
        assert plan.budget is not None and plan.longest is not None
        fits = plan.footprint.size([plan.tokens], recompute=layers) <= plan.budget
        assert fits == (plan.longest > 0)
    assert {*again} == {0, 1, 2} and plans[-1].longest == 0
    assert "DOES NOT FIT" in plans[-1].describe()


def test_the_longest_is_what_fits_with_all_layers_recomputed(catalog: Catalog) -> None:
    plan = plan_of(catalog, 1_000_000)
    assert plan.budget is not None and plan.longest is not None and 0 < plan.longest < 256
    assert plan.footprint.size([plan.longest], recompute=2) <= plan.budget
    assert plan.footprint.size([plan.longest + 1], recompute=2) > plan.budget
    off = plan_of(catalog, 1_000_000, recompute="off")
    assert off.longest is not None and off.longest < plan.longest
    assert off.layers_recomputed([10**6]) == 0
    assert plan_of(catalog, 10**12, recompute="all").layers_recomputed([1]) == 2


def test_a_window_costs_a_mask_of_every_pair(catalog: Catalog) -> None:
    plain, windowed = (
        Footprint.of(catalog.facts(name), itemsize=4, chunk=1) for name in ("llama", "mistral")
    )
    assert windowed.window == 6
    for length, pairs in ((100, 100 * 100), (2000, 2000 * (6 + BLOCK_ROWS))):
        more = windowed.size([length], recompute=0) - plain.size([length], recompute=0)
        assert more == (2 + 1) * 4 * pairs
    assert windowed.size([6] * 9, recompute=0) == plain.size([6] * 9, recompute=0)


def test_with_deterministic_the_layout_does_not_follow_memory(catalog: Catalog) -> None:
    plans = [
        plan_of(catalog, passes, device=device, deterministic=True)
        for passes in (None, 10**5, 10**7, 10**12)
        for device in (CPU, CUDA)
    ]
    assert {(plan.tokens, plan.footprint.chunk) for plan in plans} == {
        (TOKENS_PER_PASS, CHUNK_ELEMENTS)
    }


def run_in(memory: int, catalog: Catalog) -> tuple[TorchTrainer, int]:
    """A deterministic trainer with a gradient, and how many layers of its pass computed again."""
    store = ModelStore(catalog, device=CPU, dtype=torch.float32, threads=1, memory=memory)
    trainer = TorchTrainer(store, deterministic=True)
    new_run(trainer)
    data = [datum(tokens) for tokens in sequences(90, 40, 41)]
    result_of(trainer, job("run", data))
    return trainer, trainer.plan("qwen3", "lora").layers_recomputed([89, 39, 40])


def test_deterministic_gradients_are_equal_bit_for_bit_however_much_memory_there_is(
    catalog: Catalog,
) -> None:
    runs = [run_in(memory, catalog) for memory in (10**12, 5_000_000, 3_000_000)]
    assert [again for _, again in runs] == [0, 1, 2]
    first, *others = (list(gradient_of(trainer, "run").values()) for trainer, _ in runs)
    assert all(all(map(torch.equal, first, other)) for other in others)


def test_full_training_that_cannot_fit_is_refused_before_it_is_loaded(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = full_training_bytes(catalog.facts("llama"))
    assert needed == 16 * catalog.facts("llama").info.num_parameters
    store = ModelStore(catalog, device=CPU, dtype=torch.float32, threads=1, memory=needed - 1)
    trainer = TorchTrainer(store)
    with monkeypatch.context() as patch:
        patch.setattr(ModelStore, "own", lambda *_: pytest.fail("it was loaded"))
        with pytest.raises(UnsupportedError, match=r"llama needs .* LoRA") as raised:
            new_run(trainer, architecture="llama", training_mode="full_ft")
    assert raised.value.field == "training_mode"
    with pytest.raises(RunNotFoundError):
        trainer.step("run")
    new_run(trainer, architecture="llama")  # LoRA fits
    store.memory = needed
    new_run(trainer, "whole", "llama", training_mode="full_ft")
    monkeypatch.setattr("weaver.engine.torch.memory.free_bytes", lambda _: needed - 1)
    with pytest.raises(UnsupportedError):  # others have taken it since
        new_run(trainer, "second", "llama", training_mode="full_ft")


def test_an_engine_tells_how_long_a_sequence_it_can_train() -> None:
    plenty, little = TorchEngine(memory_gb=100), TorchEngine(memory_gb=0.01)
    longest = [engine.max_tokens_trained("weaver-nano", "lora") for engine in (plenty, little)]
    assert longest[0] == plenty.get_model("weaver-nano").context_length
    assert longest[1] is not None and 0 < longest[1] < longest[0]
    whole = little.max_tokens_trained("weaver-nano", "full_ft")
    assert whole is not None and whole < longest[1]


def test_settings_reach_the_plan() -> None:
    settings = Settings(memory_gb=2, tokens_per_pass=7, recompute="all", head_rows=5)
    engine = TorchEngine.of(settings)
    plan = engine.plan("weaver-nano", "lora")
    assert (engine.memory, plan.tokens, plan.layers_recomputed([1])) == (2 * 10**9, 7, 2)
    assert plan.footprint.chunk == 5 * engine.get_model("weaver-nano").vocab_size
    assert "the head's logits 5 at once" in plan.describe()
