"""Each distinct prefix is read once, and nobody can tell by the answers."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.conftest import ARCHITECTURES, new_run, sequences
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from tests.engine.test_sampler_numbers import assert_same
from tests.optional import given, st
from weaver.engine.torch.arenas import BLOCK
from weaver.engine.torch.models import PublishedWeights
from weaver.engine.torch.prefixes import Owner, Prefixes
from weaver.engine.torch.sampler import PREFIX_SHARE, TorchSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from weaver.engine.base import SampleJob
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.trainer import TorchTrainer
    from weaver.types import SampleResult


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(model_folder: Callable[[str], Path]) -> None:
    for name in ARCHITECTURES:
        save_tokenizer(model_folder(name))


# --- the tree -----------------------------------------------------------------------------------


class Row:
    """A sequence whose every block is told from all others by what it is."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.length = len(tokens)


class Cache:
    """Its blocks are the tokens up to their end; it knows which it was not told to drop."""

    block_tokens = BLOCK

    def __init__(self) -> None:
        self.alive: list[tuple[int, ...]] = []

    def prompt_bytes(self, tokens: int) -> int:
        return tokens

    def keep(self, row: Row, index: int) -> tuple[int, ...]:
        self.alive.append(row.tokens[: (index + 1) * BLOCK])
        return self.alive[-1]

    def drop(self, block: tuple[int, ...]) -> None:
        self.alive.remove(block)


PATHS = st.lists(st.integers(0, 2), max_size=5)
"""A sequence by one number a block."""


@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("keep"), st.integers(0, 3), PATHS, st.integers(0, 12)),
            st.tuples(st.just("find"), st.integers(0, 3), PATHS, st.integers(0, 5)),
            st.tuples(st.just("trim"), st.integers(0, 8)),
            st.tuples(st.just("forget"), st.integers(0, 1)),
        ),
        max_size=30,
    )
)
def test_the_tree_finds_what_was_kept_and_keeps_to_its_bytes(
    actions: list[tuple[Any, ...]],
) -> None:
    cache, prefixes = Cache(), Prefixes()
    weights = [PublishedWeights(None, None, 0) for _ in range(2)]  # type: ignore[arg-type]
    for each in weights:
        prefixes.open(each)
    owners = [Owner(w, tenant) for w in weights for tenant in ("a", "b")]
    forgotten: set[int] = set()
    for action, *values in actions:
        if action in ("keep", "find"):
            number, path, size = values
            tokens = [x for x in path for _ in range(BLOCK)] + [1] * 7
            owner = owners[number]
        if action == "keep":
            prefixes.keep(owner, tokens, Row(tokens), cache, limit=size * BLOCK)
            kept = 0 if number // 2 in forgotten else min(size, len(path))
            assert len(prefixes.find(owner, tokens, cache, most=9)) == kept
            assert number // 2 in forgotten or prefixes.nbytes <= size * BLOCK
        elif action == "find":
            found = prefixes.find(owner, tokens, cache, most=size)
            assert len(found) <= size
            assert found == [tuple(tokens[: (i + 1) * BLOCK]) for i in range(len(found))]
        elif action == "trim":
            prefixes.trim(values[0] * BLOCK)
            assert prefixes.nbytes <= values[0] * BLOCK
        else:
            prefixes.forget(weights[values[0]])
            forgotten.add(values[0])
        assert prefixes.nbytes == len(cache.alive) * BLOCK
    for each in weights:
        prefixes.forget(each)
    assert prefixes.nbytes == 0 and not cache.alive and not prefixes._roots


def test_what_was_used_least_lately_goes_first_and_ends_before_beginnings() -> None:
    cache, prefixes = Cache(), Prefixes()
    weights = PublishedWeights(None, None, 0)  # type: ignore[arg-type]
    prefixes.open(weights)
    owner = Owner(weights, "")
    old, new = [1] * 3 * BLOCK, [2] * 2 * BLOCK
    for tokens in (old, new):
        prefixes.keep(owner, tokens, Row(tokens), cache, limit=9 * BLOCK)
    prefixes.trim(4 * BLOCK)
    assert [len(prefixes.find(owner, t, cache, most=3)) for t in (new, old)] == [2, 2]
    prefixes.trim(2 * BLOCK)
    assert [len(prefixes.find(owner, t, cache, most=3)) for t in (new, old)] == [0, 2]


# --- what is read -------------------------------------------------------------------------------


@pytest.fixture
def sampler(store: ModelStore) -> TorchSampler:
    sampler = TorchSampler(store)
    sampler.load("base", "llama", None)
    return sampler


@pytest.fixture
def passes(sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass of the Llama, as they are made."""
    model = sampler._store.base("llama")
    forward, rows = model.hidden_states, list[int]()

    def counted(batch: Any) -> torch.Tensor:
        rows.append(len(batch.input_ids))
        return forward(batch)

    monkeypatch.setattr(model, "hidden_states", counted)
    return rows


def counters(sampler: TorchSampler) -> tuple[int, int]:
    return sampler.counts["prompt_tokens"], sampler.counts["reused_prompt_tokens"]


def test_a_prefix_is_read_once_for_requests_that_come_together_or_later(
    sampler: TorchSampler, passes: list[int]
) -> None:
    prefix, *ends = sequences(2 * BLOCK, 20, 25, 30, 35, seed=1)
    jobs = [sample_job(prefix + end, str(i), max_tokens=1) for i, end in enumerate(ends)]
    finish(sampler, jobs[:3])
    assert sum(passes) == len(prefix) + 20 + 25 + 30
    finish(sampler, jobs[3:])
    assert sum(passes) == len(prefix) + 20 + 25 + 30 + 35
    assert counters(sampler) == (4 * len(prefix) + 110, 3 * len(prefix))


def test_the_same_prompt_is_read_once_however_short(
    sampler: TorchSampler, passes: list[int]
) -> None:
    """Also where one of the jobs is cancelled, and one has its own samples to begin later."""
    prompt = sequences(20)[0]
    jobs = [sample_job(prompt, str(i), n=n, seed=i, max_tokens=1) for i, n in enumerate((1, 1, 70))]
    for each in jobs:
        sampler.add(each)
    sampler.cancel("0")
    together = finish(sampler)
    assert passes == [20]
    assert counters(sampler) == (60, 40)
    assert {name: r for j in jobs[1:] for name, r in finish(sampler, [j]).items()} == together


def test_a_turn_begins_with_what_the_last_one_drew(
    sampler: TorchSampler, passes: list[int]
) -> None:
    prompt = sequences(100)[0]
    (first,) = finish(sampler, [sample_job(prompt, n=20, seed=1, max_tokens=90)]).values()
    drawn = max((s.tokens for s in first.sequences), key=len)
    assert len(drawn) == 90
    passes.clear()
    turn = [*prompt, *drawn, *sequences(30, seed=5)[0]]
    (second,) = finish(sampler, [sample_job(turn, max_tokens=1)]).values()
    kept = (100 + 89) // BLOCK * BLOCK
    assert passes == [len(turn) - kept]
    fresh = TorchSampler(sampler._store)
    fresh.load("base", "llama", None)
    job = sample_job(turn, temperature=0.0, max_tokens=20)
    assert_same(finish(fresh, [job]), finish(sampler, [job]), exactly=False)
    assert second.prompt_tokens == tuple(turn)


def test_prompts_that_are_scored_are_read_afresh_and_kept(
    sampler: TorchSampler, passes: list[int]
) -> None:
    prompt = sequences(BLOCK + 40)[0]
    scored = sample_job(prompt, n=0, prompt_logprobs=True)
    first = finish(sampler, [scored])
    assert finish(sampler, [scored]) == first
    assert passes == [len(prompt)] * 2
    finish(sampler, [sample_job(prompt, max_tokens=1)])
    assert passes[2:] == [40]


def test_owners_share_nothing(sampler: TorchSampler, trainer: TorchTrainer) -> None:
    """Other weights, the same weights under another id, and other tenants."""
    sampler.publish("run", trainer.snapshot(new_run(trainer, architecture="llama")))
    sampler.load("again", "llama", None)
    prompt = sequences(BLOCK + 20)[0]
    jobs = [sample_job(prompt, w, weights_id=w, max_tokens=3) for w in ("base", "run", "again")]
    jobs += [_of_tenant(jobs[0], name) for name in ("ann", "bob")]
    finish(sampler, jobs)
    finish(sampler, jobs[:1])
    assert counters(sampler) == (6 * len(prompt), BLOCK)
    for weights in ("base", "run"):
        sampler.release(weights)
    assert sampler._reader.prefixes.nbytes == _blocks(sampler, 1)
    sampler.load("again", "llama", None)
    assert sampler._reader.prefixes.nbytes == 0


def _of_tenant(job: SampleJob, tenant: str) -> SampleJob:
    return replace(job, job_id=tenant, tenant=tenant)


def _blocks(sampler: TorchSampler, count: int) -> int:
    cache = next(iter(sampler._reader._caches.values()))
    return cache.prompt_bytes(count * BLOCK)


def test_rows_take_the_room_of_prefixes(store: ModelStore) -> None:
    sampler = TorchSampler(store)
    sampler.load("base", "llama", None)
    finish(sampler, [sample_job([5] * 10, max_tokens=1)])
    limit = 8 * _blocks(sampler, 1)
    sampler = TorchSampler(store, cache_bytes=limit)
    sampler.load("base", "llama", None)
    for prompt in sequences(80, 90, 100):
        finish(sampler, [sample_job(prompt, max_tokens=1)])
    assert sampler._reader.prefixes.nbytes == limit // PREFIX_SHARE == _blocks(sampler, 2)
    sampler.add(sample_job([5] * 20, n=7, max_tokens=44, temperature=0.0))
    sampler.step()
    assert sampler._admission.rows == 7
    assert sampler._reader.prefixes.nbytes <= limit - sampler._admission.held_bytes
    finish(sampler)


def test_a_job_that_outlives_its_weights_keeps_nothing(
    sampler: TorchSampler, trainer: TorchTrainer
) -> None:
    """Neither of an adapter nor of a whole model's snapshot, which is sampled with reuse, too."""
    full = new_run(trainer, "full", "llama", training_mode="full_ft")
    sampler.publish("full", trainer.snapshot(full))
    prompt = sequences(2 * BLOCK)[0]
    job = sample_job(prompt, weights_id="full", temperature=0.0, max_tokens=90)
    fresh = finish(sampler, [job])
    assert_same(fresh, finish(sampler, [job]), exactly=False)
    assert counters(sampler)[1] == BLOCK
    sampler.add(job)
    for _ in range(3):
        sampler.step()
    sampler.release("full")
    assert sampler._reader.prefixes.nbytes == 0
    assert_same(fresh, finish(sampler), exactly=False)
    assert sampler._reader.prefixes.nbytes == 0 and not sampler._reader.prefixes._roots


# --- the answers --------------------------------------------------------------------------------


def without_reuse(sampler: TorchSampler, job: SampleJob) -> SampleResult:
    """The answer of a job alone, where nothing is kept."""
    prefixes = sampler._reader.prefixes
    opened, prefixes._open = prefixes._open, set()
    (result,) = finish(sampler, [job]).values()
    prefixes._open = opened
    return result


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_any_interleaving_answers_as_without_reuse(
    architecture: str, deterministic: bool, store: ModelStore, trainer: TorchTrainer
) -> None:
    """Within 2e-5, or exactly in deterministic mode; of prompts that grow out of each other.

    Weights are released meanwhile and jobs cancelled; bytes keep to their bound, and nothing is
    left.
    """
    rng = random.Random(architecture)
    settings: dict[str, Any] = {"deterministic": deterministic}
    if deterministic:
        settings["prefill_tokens"] = 32
    reused, limit = 0, 4000 * 256
    for little in ({}, {"cache_bytes": limit, "max_rows": 6}):
        plain, tested = (TorchSampler(store, **settings, **little) for _ in range(2))
        snapshots = {
            f"run-{i}": trainer.snapshot(new_run(trainer, f"run-{i}", architecture, seed=i))
            for i in range(2)
        }
        for each in (plain, tested):
            each.load("base", architecture, None)
            for name, snapshot in snapshots.items():
                each.publish(name, snapshot)
        known, results = sequences(70, 140, seed=4), {}
        jobs: dict[str, SampleJob] = {}
        for number in range(40):
            base = rng.choice(known)
            prompt = base[: rng.choice([30, BLOCK, BLOCK + 1, 130, 200])]
            prompt = [*prompt, *sequences(rng.choice([0, 3, 40]), seed=number)[0]][:200]
            job = sample_job(
                prompt,
                str(number),
                weights_id=rng.choice(["base", "run-0", "run-1"]),
                n=rng.choice([1, 2]),
                seed=number,
                max_tokens=rng.choice([1, 20]),
                prompt_logprobs=rng.random() < 0.2,
            )
            if job.weights_id in tested._weights:
                jobs[job.job_id] = job
                tested.add(job)
            if number == 25:
                tested.release("run-1")
            if rng.random() < 0.1:
                gone = rng.choice(sorted(jobs))
                tested.cancel(gone)
                if gone not in results:
                    del jobs[gone]
            for _ in range(rng.choice([0, 1, 5])):
                for progress in tested.step():
                    assert progress.error is None
                    if progress.result is not None:
                        results[progress.job_id] = progress.result
                        turns = progress.result.sequences
                        known.append([*progress.result.prompt_tokens, *turns[0].tokens])
                if little:
                    assert tested._reader.prefixes.nbytes <= limit // PREFIX_SHARE
        results |= finish(tested)
        reused += counters(tested)[1]
        assert results.keys() == jobs.keys()
        alone = {name: without_reuse(plain, job) for name, job in jobs.items()}
        assert_same(alone, results, exactly=deterministic)
        for name in ("base", "run-0"):
            tested.release(name)
        assert tested._reader.prefixes.nbytes == 0
    assert reused > 500


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_seed_twice_is_equal_to_the_last_bit(
    store: ModelStore, deterministic: bool
) -> None:
    """Though all is read the first time, and little the second."""
    settings: dict[str, Any] = {"prefill_tokens": 64} if deterministic else {}
    sampler = TorchSampler(store, deterministic=deterministic, **settings)
    sampler.load("base", "qwen3", None)
    jobs = [
        sample_job(prompt, str(i), n=3, seed=i, max_tokens=20, temperature=1.2)
        for i, prompt in enumerate(sequences(65, 100, 129, 200, 230))
    ]
    first = {name: r for j in jobs for name, r in finish(sampler, [j]).items()}
    second = {name: r for j in jobs for name, r in finish(sampler, [j]).items()}
    assert counters(sampler)[1] > 400
    assert first == second
    if deterministic:
        assert finish(sampler, jobs[::-1]) == first
