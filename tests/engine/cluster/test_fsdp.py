"""Ranks that divide their models: what is promised of one process, and what is of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
import torch

from tests.engine.cluster.spmd import in_ranks
from tests.engine.conftest import of_the_cpu
from weaver.engine.base import WeightsRef
from weaver.engine.cluster.merge import Ranks
from weaver.engine.torch.catalog import NANO, Catalog
from weaver.engine.torch.device import full_training_bytes, part_bytes
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.quantised import weights_bytes
from weaver.engine.torch.shards import check_divided
from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from weaver.engine.torch.model_store import ModelStore

FILE = str(Path(__file__).with_name("of_fsdp.py"))
pytestmark = [of_the_cpu, pytest.mark.timeout(600)]


def test_two_ranks_train_and_save_as_one_process(tmp_path: Path) -> None:
    some = "(every_loss and cross_entropy and mean) or (checkpoint_is and qwen2)"
    in_ranks(2, tmp_path, [FILE, "-k", some], within_s=240)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_trainers_contract_and_every_loss_over_ranks(tmp_path: Path, size: int) -> None:
    some = [] if size == 2 else ["-k", "not moe and not gpt_oss"]  # of four experts
    in_ranks(size, tmp_path, [FILE, *some], within_s=500)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_loaded_by_three_and_by_one(tmp_path: Path) -> None:
    for size in (2, 3, 1):
        in_ranks(size, tmp_path, [FILE, "-k", "handed_on"], within_s=240)


def test_weights_that_are_not_divided_are_named(store: ModelStore) -> None:
    """Those of frozen layers are no parameters, so that FSDP2 says nothing of them."""
    model = store.base("qwen3")
    said = r"2 ranks would divide 0 of at least [\d,]+ weights in the layers of qwen3"
    with pytest.raises(UnsupportedError, match=said) as refused:
        check_divided(model._layers, model.facts, ranks=2)
    assert refused.value.field == "mode"


@pytest.mark.parametrize("merge", [True, False])
def test_every_rank_makes_as_many_passes(merge: bool) -> None:
    lengths = [[100, 1, 50, 49], [7], [7], [30]]
    plans = [
        Ranks(None, rank=rank, size=3, divided=True).plan(lengths, budget=50, merge=merge)
        for rank in range(3)
    ]
    alone = [
        Ranks(None, rank=rank, size=3).plan(lengths, budget=50, merge=merge) for rank in range(3)
    ]
    assert len({len(plan) for plan in plans}) == 1
    assert [[each for each in plan if each] for plan in plans] == alone


def test_a_base_that_the_server_cannot_hold_is_refused_where_it_is_sampled() -> None:
    engine = TorchEngine({"large": NANO}, device="cpu", memory_gb=1e-4, threads=1)
    try:
        with pytest.raises(UnsupportedError, match=r"the weights of .* take"):
            engine.prepare()
        engine.prepare(larger=["large"])
        with pytest.raises(UnsupportedError, match=r"the weights of .* take"):
            anyio.run(engine.publish, "base", WeightsRef(base_model="large"))
    finally:
        engine.close()


def test_what_a_rank_holds_is_reckoned(catalog: Catalog) -> None:
    facts = catalog.facts("llama")
    whole = weights_bytes(facts, dtype=torch.float32, quantize="none")
    assert part_bytes(facts, whole, ranks=1) == whole
    many = part_bytes(facts, whole, ranks=1000)
    ends = 2 * 4 * facts.info.vocab_size * facts.config.hidden_size
    assert ends < many <= ends + 1.01 * (whole - ends)  # of two layers
    assert full_training_bytes(facts, ranks=8) < full_training_bytes(facts)
