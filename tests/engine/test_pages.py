"""Sampling from pages, as on CUDA, is sampling from arenas; a reference stands for the kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.engine.conftest import ARCHITECTURES, sequences
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from tests.engine.test_model_check import store_of
from tests.engine.test_sampler_numbers import assert_same
from tests.engine.varlen_reference import varlen_attn
from weaver.engine.torch import model_check
from weaver.engine.torch.arenas import BLOCK, ArenaCache
from weaver.engine.torch.attention_choice import ARENAS, Paging
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.pages import PageCache, PagedAttention, gathered_attention
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.varlen import paged_varlen_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.torch.model_store import ModelStore

PAGED_VARLEN = partial(paged_varlen_attention, varlen_attn=varlen_attn)


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(model_folder: Callable[[str], Path]) -> None:
    for name in ARCHITECTURES:
        save_tokenizer(model_folder(name))


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("qwen3", PAGED_VARLEN),
        ("mistral", PAGED_VARLEN),
        ("gemma2", gathered_attention),
        ("gpt_oss", gathered_attention),
    ],
)
def test_samples_are_those_of_arenas(
    architecture: str,
    attention: PagedAttention,
    store: ModelStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of prompts that are read in pieces, with many samples each, of which some end early; two
    begin alike."""
    model = store.base(architecture)
    cache = PageCache(
        CacheShape.of(model.facts, dtype=model.dtype, device=model.device), attention, page=16
    )

    def results() -> dict[str, object]:
        sampler = TorchSampler(store, prefill_tokens=20)
        sampler.load("base", architecture, None)
        jobs = [
            sample_job(p, str(i), n=1 + 3 * i, seed=i, max_tokens=30, prompt_logprobs=i < 3)
            for i, p in enumerate(sequences(5, 16, 33, 70, seed=3))
        ]
        jobs.append(replace(jobs[3], job_id="begins alike", prompt=[*jobs[3].prompt, *[5] * 20]))
        sampler.add(sample_job(sequences(40)[0], "cancelled", n=3, max_tokens=50))
        for _ in range(9):
            sampler.step()
        sampler.cancel("cancelled")
        answers = finish(sampler, jobs)
        assert sampler.counts["reused_prompt_tokens"] == BLOCK == 4 * 16
        sampler.release("base")
        return answers

    right = results()
    monkeypatch.setattr(model, "new_cache", lambda: cache)
    assert_same(results(), right, exactly=False)
    assert sorted(cache.pool.free) == list(range(1, len(cache.pool.refs)))
    assert len(cache.pool.refs) > 10


def test_a_model_keeps_its_tokens_by_what_was_chosen(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Paging("varlen", PAGED_VARLEN)
    monkeypatch.setattr(model_check, "paging_by_rule", lambda *_, **__: [chosen, ARENAS])
    model = store_of(model_folder("llama")).base("base")
    assert model.paging is chosen
    assert isinstance(model.new_cache(), PageCache)


def test_a_model_whose_pages_would_be_read_wrongly_keeps_arenas(
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = Paging("wrong", lambda heads, kv, tables: heads.q.transpose(1, 2))
    monkeypatch.setattr(model_check, "paging_by_rule", lambda *_, **__: [wrong, ARENAS])
    monkeypatch.setattr(model_check, "paging_fault_of", lambda *_, **__: "")
    model = store_of(model_folder("llama")).base("base")
    assert model.paging is ARENAS
    assert isinstance(model.new_cache(), ArenaCache)
    assert any("read piece by piece would differ" in record.message for record in caplog.records)
