"""A pool draws, ends, streams, scores, shares out and drops jobs; its workers are processes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.engine.cluster.kit import (
    BASE,
    Told,
    a_job,
    begin,
    gone,
    one,
    pids,
    save_adapter,
    standins,
    until,
)
from weaver.engine.base import WeightsRef
from weaver.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ClosedError,
    ContextLengthError,
    NonFiniteError,
    NotFoundError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weaver.engine.cluster.pool import SamplerPool

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"], autouse=True)
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The pool has a loop of its own; one test is also of another backend."""
    return str(request.param)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplerPool]:
    """Two workers, for the tests that harm none."""
    with standins(tmp_path_factory.mktemp("pool"), workers=2) as pool:
        yield pool


@pytest.fixture
async def pool(shared: SamplerPool) -> SamplerPool:
    await shared.publish("base", BASE)
    return shared


def adapter(folder: Path, **how: Any) -> WeightsRef:
    return WeightsRef(base_model="letters", uri=save_adapter(folder, **how).as_uri())


# --- what is drawn ------------------------------------------------------------------------------


async def test_a_sample_ends_at_a_stop_a_token_the_length_or_the_context(
    pool: SamplerPool,
) -> None:
    plain = await one(pool)
    text = bytes(plain.tokens).decode()
    assert (plain.stop_reason, len(plain.tokens), plain.text) == ("length", 12, text)
    stopped = await one(pool, stop=text[4:7])
    cut = text.index(text[4:7])
    assert (stopped.stop_reason, stopped.text) == ("stop", text[:cut])
    assert stopped.tokens == plain.tokens[: cut + 3]
    ended = await one(pool, stop_token_ids=[plain.tokens[5]])
    at = plain.tokens.index(plain.tokens[5])
    assert (ended.stop_reason, ended.tokens) == ("stop", plain.tokens[: at + 1])
    long = await one(pool, "x" * 61)
    assert (long.stop_reason, len(long.tokens)) == ("length", 3)
    assert plain.logprobs == plain.sampling_logprobs
    tempered = await one(pool, temperature=0.5)
    assert tempered.sampling_logprobs == tuple(x / 2 for x in tempered.logprobs)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_streamed_pieces_make_up_the_result(pool: SamplerPool) -> None:
    told = begin(pool, a_job(n=3, stop=["a", "bc"], max_tokens=25, stream=True))
    result = await told.result()
    for index, sequence in enumerate(result.sequences):
        deltas = [delta for delta in told.deltas if delta.index == index]
        assert "".join(delta.text for delta in deltas) == sequence.text
        assert tuple(t for delta in deltas for t in delta.tokens) == sequence.tokens
        assert [d.stop_reason for d in deltas if d.stop_reason] == [sequence.stop_reason]


async def test_a_seed_repeats_each_sample_whatever_their_number(pool: SamplerPool) -> None:
    three = (await begin(pool, a_job(n=3, seed=5)).result()).sequences
    two = (await begin(pool, a_job(n=2, seed=5)).result()).sequences
    assert three[:2] == two and len({s.tokens for s in three}) == 3
    assert (await one(pool, seed=6)).tokens not in {s.tokens for s in three}
    unseeded = [await one(pool, seed=None) for _ in range(2)]
    assert unseeded[0].tokens != unseeded[1].tokens


async def test_a_prompt_is_scored_alone_and_beside_samples(pool: SamplerPool) -> None:
    alone = await begin(pool, a_job("abc", n=0, prompt_logprobs=True)).result()
    assert alone.sequences == () and alone.prompt_logprobs is not None
    assert alone.prompt_logprobs[0] is None and len(alone.prompt_logprobs) == 3
    both = await begin(pool, a_job("abc", n=2, prompt_logprobs=True)).result()
    assert both.prompt_logprobs == alone.prompt_logprobs and len(both.sequences) == 2
    full = await begin(pool, a_job("x" * 64, n=0, prompt_logprobs=True)).result()
    assert full.prompt_logprobs is not None and len(full.prompt_logprobs) == 64
    short = await begin(pool, a_job("x", n=0, prompt_logprobs=True)).result()
    assert short.prompt_logprobs == (None,)


# --- what is refused ----------------------------------------------------------------------------


async def test_what_cannot_be_drawn_is_refused_by_name(pool: SamplerPool) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"prompt": "x" * 64}, ContextLengthError, "prompt"),
        ({"weights_id": "none"}, NotFoundError, "weights_id"),
        ({"temperature": 3.0}, UnsupportedError, "params.temperature"),
        ({"temperature": 0.001}, UnsupportedError, "params.temperature"),
        ({"min_p": 0.1, "top_p": 0.9}, UnsupportedError, "params.min_p"),
    ]
    for changes, kind, field in cases:
        error = await begin(pool, a_job(**changes)).error()
        assert type(error) is kind and error.field == field
    assert (await one(pool, min_p=0.1)).tokens == (await one(pool, temperature=0.0)).tokens


async def test_a_worker_that_tells_one_log_probability_refuses_what_needs_two(
    tmp_path: Path,
) -> None:
    with standins(tmp_path, both=False) as pool:
        await pool.publish("base", BASE)
        for changes in ({"temperature": 0.5}, {"top_k": 3}, {"repetition_penalty": 1.1}):
            error = await begin(pool, a_job(**changes)).error()
            assert isinstance(error, UnsupportedError) and "sampling_logprobs" in error.message
        assert await one(pool) and await one(pool, temperature=0.0, top_k=3)


async def test_adapters_that_the_workers_cannot_hold_are_refused(
    pool: SamplerPool, tmp_path: Path
) -> None:
    broken = save_adapter(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "whole").mkdir()
    cases = [
        (adapter(tmp_path / "r9", rank=9), CheckpointMismatchError, "rank 9"),
        (adapter(tmp_path / "o", layers=("o_proj",)), CheckpointMismatchError, "o_proj"),
        (WeightsRef(base_model="x", uri=broken.as_uri()), CheckpointCorruptError, "broken"),
        (
            WeightsRef(base_model="x", uri=(tmp_path / "whole").as_uri()),
            UnsupportedError,
            "no adapter",
        ),
    ]
    for ref, kind, words in cases:
        with pytest.raises(kind, match=words):
            await pool.publish("refused", ref)
    assert isinstance(await begin(pool, a_job(weights_id="refused")).error(), NotFoundError)


async def test_numbers_that_are_not_finite_fail_their_job(tmp_path: Path) -> None:
    with standins(tmp_path, fault="nan") as pool:
        await pool.publish("base", BASE)
        error = await begin(pool, a_job(n=2)).error()
        assert isinstance(error, NonFiniteError) and "sample 0, token 0" in error.message
        assert pool.room().free_rows == pool.room().rows


# --- weights ------------------------------------------------------------------------------------


async def test_weights_are_read_from_a_folder_of_the_pools_own(
    pool: SamplerPool, tmp_path: Path
) -> None:
    ref = adapter(tmp_path / "a")
    assert await pool.publish("w", ref) == 3
    first = await one(pool, weights_id="w")
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    assert await one(pool, weights_id="w") == first and first.weights_version == 3
    await pool.publish("again", WeightsRef(base_model="x", uri=adapter(tmp_path / "b").uri))
    assert (await one(pool, weights_id="again")).tokens != first.tokens  # its name is a new one
    assert (await one(pool)).weights_version == 0


async def test_running_jobs_keep_their_weights_after_their_release(tmp_path: Path) -> None:
    with standins(tmp_path, pace_s=0.01) as pool:
        await pool.publish("w", adapter(tmp_path / "a"))
        folders = [f for f in (tmp_path / "shelf").glob("*/*") if f.is_dir()]
        told = begin(pool, a_job(weights_id="w", stream=True))
        await told.some.wait()
        await pool.release("w")
        await pool.release("w")
        assert len(folders) == 1 and folders[0].exists()
        assert isinstance(await begin(pool, a_job(weights_id="w")).error(), NotFoundError)
        assert (await told.result()).sequences
        await until(lambda: not folders[0].exists())
    assert list((tmp_path / "shelf").iterdir()) == []


# --- room ---------------------------------------------------------------------------------------


async def test_jobs_wait_for_room_and_tenants_take_turns(tmp_path: Path) -> None:
    with standins(tmp_path, rows=2, pace_s=0.005) as pool:
        await pool.publish("base", BASE)
        ended: list[str] = []
        greedy = [begin(pool, a_job(job_id=f"many-{i}", n=2, tenant="many")) for i in range(4)]
        large = begin(pool, a_job(job_id="large", n=5, tenant="large"))
        other = begin(pool, a_job(job_id="few", tenant="few"))
        await until(lambda: pool.room().waiting == 5)
        assert pool.room().free_rows == 0
        async with anyio.create_task_group() as group:

            async def watch(name: str, told: Told) -> None:
                await told.result()
                ended.append(name)

            for i, told in enumerate(greedy):
                group.start_soon(watch, f"many-{i}", told)
            group.start_soon(watch, "large", large)
            group.start_soon(watch, "few", other)
        assert ended[0] == "many-0" and set(ended[1:3]) == {"few", "large"}
        assert pool.room().free_rows == 2 and pool.room().waiting == 0


async def test_a_dropped_job_is_told_nothing_and_its_room_is_free(tmp_path: Path) -> None:
    with standins(tmp_path, rows=2, pace_s=0.01) as pool:
        await pool.publish("base", BASE)
        running = begin(pool, a_job(job_id="a", n=2, max_tokens=60, stream=True))
        waiting = begin(pool, a_job(job_id="b"))
        await running.some.wait()
        at_once = begin(pool, a_job(job_id="c"))
        for told in (running, waiting, at_once):
            told.drop()
            told.drop()
        told_so_far = len(running.progress)
        assert await one(pool, job_id="d") and pool.room().free_rows == 2
        assert len(running.progress) == told_so_far
        assert waiting.progress == at_once.progress == []


async def test_a_pool_tells_what_it_has_drawn(tmp_path: Path) -> None:
    with standins(tmp_path, workers=2) as pool:
        assert pool.room().workers == 0 and pool.counts["worker_starts"] == 0
        assert (await pool.ready()).rows == 8
        await until(lambda: pool.room().workers == 2)
        await pool.publish("base", BASE)
        await one(pool, "abc")
        assert (pool.room().rows, pool.room().faults) == (16, ())
        assert pool.counts["prompt_tokens"] == 3 and pool.counts["repeated_samples"] == 0
        [first, second] = pids(tmp_path)
    for pid in (first, second):
        await gone(pid)
    with pytest.raises(ClosedError):
        await pool.ready()
    gc.collect()
