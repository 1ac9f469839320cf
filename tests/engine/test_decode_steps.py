"""Steps from static buffers are plain steps, whatever pads them; a CPU runs them unrecorded."""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.conftest import ARCHITECTURES, LORA, new_run, sequences
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from tests.engine.test_model_check import store_of
from tests.engine.test_sampler_numbers import assert_same
from tests.engine.varlen_reference import varlen_attn
from weaver.engine.torch import model_check
from weaver.engine.torch.attention_choice import ARENAS, Paging
from weaver.engine.torch.decode_steps import DecodeSteps
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.lora import Adapter, new_adapter
from weaver.engine.torch.packing import pack
from weaver.engine.torch.pages import PageCache, Paged, gathered_attention
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.varlen import paged_varlen_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.torch.decode_steps import Compute
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.models import LoadedModel
    from weaver.engine.torch.trainer import TorchTrainer

PAGE = 16


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(model_folder: Callable[[str], Path]) -> None:
    for name in ARCHITECTURES:
        save_tokenizer(model_folder(name))


class Records:
    """As `CudaGraphs`, without a graph: what is repeated must not need anything but the buffers."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        output = compute().clone()
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            return output.copy_(compute())

        return replay


def adapter_of(model: LoadedModel, seed: int, *, rank: int = 2) -> Adapter:
    config = LORA.model_copy(update={"rank": rank, "train_mlp": not model.facts.fused_experts})
    targets = [t for t in model.facts.targets.values() if config.train_mlp or t.role == "attn"]
    adapter = new_adapter(targets, config, seed=seed, device=model.device)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.a.requires_grad_(False)
            pair.b.requires_grad_(False).normal_(0, 0.1)
    return adapter


def cache_of(model: LoadedModel, attention: Any = gathered_attention) -> PageCache:
    shape = CacheShape.of(model.facts, dtype=model.dtype, device=model.device)
    return PageCache(shape, attention, page=PAGE)


@torch.no_grad()
def begin(model: LoadedModel, cache: PageCache, lengths: list[int]) -> list[Paged]:
    """A row behind a prompt of each length."""
    tokens = sequences(*lengths, seed=7)
    prompts = [cache.prompt(length) for length in lengths]
    reading = cache.read(list(zip(prompts, lengths, strict=True)))
    model.hidden_states(
        pack(tokens, adapters=[None] * len(lengths), device=model.device, cache=reading)
    )
    return list(cache.rows().add([(prompt, 1) for prompt in prompts]))


@pytest.mark.parametrize("count", [1, 3, 4, 5])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("qwen3", partial(paged_varlen_attention, varlen_attn=varlen_attn)),
        ("mistral", gathered_attention),
        ("gpt_oss", gathered_attention),
    ],
)
@torch.no_grad()
def test_padded_steps_are_plain_steps(
    architecture: str, attention: Any, count: int, store: ModelStore
) -> None:
    """Over new pages and wider buckets, with adapters that take turns and none."""
    model = store.base(architecture)
    lengths = [3, 15, 16, 40, 31][:count]
    first, second, wide = (adapter_of(model, s, rank=r) for s, r in ((1, 2), (2, 2), (3, 3)))
    caches = [cache_of(model, attention) for _ in range(2)]
    ours, theirs = (begin(model, cache, lengths) for cache in caches)
    records = Records()
    steps = DecodeSteps(records)
    turns = [None, first, first, second, first, wide, None, second] * 3
    for i, adapter in enumerate(turns):
        tokens = [3 + (i * 7 + n) % 50 for n in range(count)]
        adapters = [adapter] * count
        hidden = steps.hidden(model, caches[0], ours, tokens, adapters)
        assert hidden is not None
        right = model.hidden_states(
            pack(
                [[token] for token in tokens],
                adapters=adapters,
                device=model.device,
                starts=[row.length for row in theirs],
                cache=caches[1].decode(theirs),
            )
        )
        torch.testing.assert_close(hidden, right, rtol=0, atol=2e-5)
        assert [row.length for row in ours] == [row.length for row in theirs]
    assert records.recorded < records.replayed / 2 < len(turns)


@torch.no_grad()
def test_rows_of_several_adapters_take_the_plain_step(store: ModelStore) -> None:
    model = store.base("llama")
    cache = cache_of(model)
    rows = begin(model, cache, [3, 4])
    adapters = [adapter_of(model, 1), None]
    before = [row.length for row in rows]
    assert DecodeSteps(Records()).hidden(model, cache, rows, [5, 6], adapters) is None
    assert [row.length for row in rows] == before


def unrecordable(compute: Compute) -> Compute:
    raise RuntimeError("operation not permitted when stream is capturing")


def no_room(compute: Compute) -> Compute:
    raise torch.OutOfMemoryError("no room for a graph")


def inexact(compute: Compute) -> Compute:
    return lambda: compute() * 1.1


def stale(compute: Compute) -> Compute:
    output = torch.full_like(compute(), torch.nan)
    return lambda: output


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (no_room, "no room for a graph"),
        (unrecordable, "it fails: operation not permitted when stream is capturing"),
        (inexact, "a replay differs by 0.1"),
        (stale, "a replay differs by nan"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_computed_as_before(
    record: Any,
    said: str,
    store: ModelStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = store.base("llama")
    monkeypatch.setattr(model, "new_cache", lambda: cache_of(model))
    job = sample_job(sequences(20)[0], n=3, seed=4, max_tokens=20)

    def sampled() -> dict[str, Any]:
        sampler = TorchSampler(store)
        sampler.load("base", "llama", None)
        return finish(sampler, [job])

    right = sampled()
    monkeypatch.setattr(model, "steps", DecodeSteps(record))
    assert_same(sampled(), right, exactly=False)
    [message] = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert re.fullmatch(f"decoding goes on without CUDA graphs: {said}", message)


def test_sampling_by_steps_is_sampling(
    store: ModelStore, trainer: TorchTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join, end and change their number; of the base model, an adapter, and of both."""
    model = store.base("llama")
    run = new_run(trainer, "by-steps", "llama")
    (tmp_path / "saved").mkdir()
    trainer.save(run, include_optimizer=False)(tmp_path / "saved")
    monkeypatch.setattr(model, "new_cache", lambda: cache_of(model))

    def sampled(names: tuple[str, ...]) -> dict[str, Any]:
        sampler = TorchSampler(store)
        sampler.load("base", "llama", None)
        sampler.load("tuned", "llama", tmp_path / "saved")
        prompts = sequences(5, 16, 33, 70, seed=3)
        jobs = [
            sample_job(p, f"{i}{name}", weights_id=name, n=1 + 2 * i, seed=i, max_tokens=9 + 9 * i)
            for name in names
            for i, p in enumerate(prompts)
        ]
        return finish(sampler, jobs)

    for names in (("base",), ("tuned",), ("base", "tuned")):
        monkeypatch.setattr(model, "steps", None)
        right = sampled(names)
        records = Records()
        monkeypatch.setattr(model, "steps", DecodeSteps(records))
        assert_same(sampled(names), right, exactly=False)
        if len(names) == 1:
            assert records.replayed > records.recorded > 1


def test_a_model_is_checked_with_its_steps(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records()
    gather = Paging("gather", gathered_attention)
    monkeypatch.setattr(model_check, "paging_by_rule", lambda *_, **__: [gather, ARENAS])
    settle = model_check.settle_attention

    def with_steps(model: LoadedModel) -> None:
        model.steps = DecodeSteps(records)
        settle(model)

    monkeypatch.setattr("weaver.engine.torch.model_store.settle_attention", with_steps)
    assert store_of(model_folder("qwen3")).base("base").paging is gather
    assert records.replayed >= 2
