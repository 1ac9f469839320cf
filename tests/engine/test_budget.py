"""How many samples run at once, from a device's memory; and that memory keeps to it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from tests.engine.conftest import SIZES, save_tiny
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from weaver.engine.torch.arenas import ArenaCache, ArenaRow, ArenaRows
from weaver.engine.torch.budget import CPU_ROWS, FIXED_TOKENS, MAX_ROWS, Budget
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.sampler import TorchSampler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Of the tiny Qwen3: keys and values, 2 layers, 2 heads of 16 numbers, in float32."""


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(model_folder: Callable[[str], Path]) -> None:
    for name in ("qwen3", "llama"):
        save_tokenizer(model_folder(name))


def budget(**settings: Any) -> Budget:
    return Budget(**{"device": CPU, "dtype": torch.float32, "memory": 10**9, **settings})


def test_a_budget_follows_memory_models_and_settings(catalog: Catalog) -> None:
    facts, other = catalog.facts("qwen3"), catalog.facts("llama")
    of_memory = budget().cache_bytes(facts)
    assert 3 * 10**8 < of_memory < 5 * 10**8
    beside = budget().cache_bytes(facts, beside=4 * other.info.num_parameters)
    assert of_memory - beside == pytest.approx(2 * other.info.num_parameters, abs=2)
    assert budget(memory=1000).cache_bytes(facts, beside=1000) == 0
    fixed = FIXED_TOKENS * TOKEN_BYTES
    assert budget(memory=None).cache_bytes(facts) == fixed
    assert budget(deterministic=True).cache_bytes(facts, beside=1000) == fixed
    for deterministic in (False, True):
        chosen = budget(set_bytes=5000, set_rows=3, deterministic=deterministic)
        assert (chosen.cache_bytes(facts), chosen.rows) == (5000, 3)
    assert (budget().rows, budget(device=torch.device("cuda")).rows) == (CPU_ROWS, MAX_ROWS)
    assert budget(set_bytes=10 * TOKEN_BYTES).text(facts).startswith("64 at once, 0.0 MB")


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a context of 8192 tokens."""
    folder = tmp_path_factory.mktemp("long")
    sizes = SIZES | {"max_position_embeddings": 8192}
    save_tiny(transformers.Qwen3Config(**sizes, head_dim=16), folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("row_count", "admitted"), [(10, 10), (3.5, 3), (0, 1)])
def test_as_many_long_samples_are_admitted_as_memory_holds(
    long_model: Path, row_count: float, admitted: int
) -> None:
    """Ten rows of 4096 tokens where there is memory for them, and fewer where there is less."""
    catalog = Catalog({"base": long_model}, allow_paths=False)
    facts = catalog.facts("base")
    row_bytes = 5 * 1024 * TOKEN_BYTES
    beside = 10**9 - 2 * budget(memory=10**9).cache_bytes(facts) / 0.9
    memory = int(beside + (row_count * row_bytes + 1000 * TOKEN_BYTES) * 2 / 0.9)
    store = ModelStore(catalog, device=CPU, dtype=torch.float32, threads=1, memory=memory)
    sampler = TorchSampler(store)
    sampler.load("base", "base", None)
    sampler.add(sample_job([5] * 32, n=12, max_tokens=4096))
    sampler.step()
    assert sampler._admission.rows == admitted
    sampler.cancel("job")
    assert sampler._admission.held_bytes == 0


def test_models_of_different_shapes_share_bytes(store: ModelStore) -> None:
    """A row of the Qwen3 takes twice the bytes of one of the Llama."""
    arena = 64 * TOKEN_BYTES
    for name, rows in (("qwen3", 4), ("llama", 8)):
        sampler = TorchSampler(store, cache_bytes=4 * arena + 10 * TOKEN_BYTES)
        sampler.load("base", name, None)
        sampler.add(sample_job([5] * 10, n=12, max_tokens=40))
        sampler.step()
        assert sampler._admission.rows == rows


def test_memory_follows_what_is_reserved(
    store: ModelStore,
) -> None:
    """Arenas and prompts, at every step of a random load, take at most twice what is counted."""
    rng = random.Random(0)
    sampler = TorchSampler(store, cache_bytes=2000 * TOKEN_BYTES, max_rows=12)
    sampler.load("base", "qwen3", None)
    peak = 0
    for number in range(120):
        if number < 60:
            length, n = rng.randrange(1, 100), rng.choice([1, 1, 4])
            job = sample_job([5] * length, str(number), n=n, max_tokens=rng.randrange(1, 140))
            sampler.add(job)
        if number % 5 == 0:
            sampler.cancel(str(rng.randrange(60)))
        sampler.step()
        arenas = [a for g in sampler._groups.values() for a in g._cache._arenas.values()]
        prompts = {j.prompt.cached for j in sampler._jobs.values()} - {None}
        taken = sum(x.kv.nbytes for x in [*arenas, *prompts])
        held = sampler._admission.held_bytes
        assert taken <= 2 * held and held <= 2000 * TOKEN_BYTES
        peak = max(peak, taken)
    assert peak > 1000 * TOKEN_BYTES
    finish(sampler)


def test_arenas_are_at_most_twice_their_rows() -> None:
    """Whatever comes and goes."""
    shape = CacheShape(num_layers=1, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=CPU)
    rng = random.Random(1)
    cache = ArenaCache(shape)
    rows, running = ArenaRows(shape), list[ArenaRow]()
    for _ in range(300):
        if rng.random() < 0.5:
            prompt = cache.prompt(rng.choice([1, 100, 3000]))
            prompt.length = prompt.kv.shape[3]
            running += rows.add([(prompt, rng.randrange(1, 6))])
        for _ in range(min(len(running), rng.randrange(4))):
            rows.remove([running.pop(rng.randrange(len(running)))])
        taken = sum(arena.kv.nbytes for arena in rows._arenas.values())
        assert taken <= 2 * sum(cache.row_bytes(row.length, 1) for row in running)
