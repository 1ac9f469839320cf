"""Workers die, hang, and are not what they should be: named, in time, and nobody else is harmed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.engine.cluster import kit
from tests.engine.cluster.kit import (
    BASE,
    a_job,
    begin,
    gone,
    kill,
    one,
    pids,
    save_adapter,
    standins,
    until,
)
from weaver.engine.base import WeightsRef
from weaver.engine.cluster import place, worker_process
from weaver.errors import EngineError

if TYPE_CHECKING:
    from weaver.types import SampleResult

pytestmark = pytest.mark.anyio
MANY = 20


@pytest.fixture
def anyio_backend() -> str:
    """The pool has a loop of its own."""
    return "asyncio"


def sequences(results: list[SampleResult]) -> list[Any]:
    return [result.sequences for result in results]


async def test_of_a_killed_worker_all_is_drawn_again_elsewhere(tmp_path: Path) -> None:
    """With the same seeds, so that nobody sees it."""
    jobs = [a_job([i], str(i), n=2, seed=i, prompt_logprobs=True) for i in range(MANY)]
    with standins(tmp_path, workers=2, pace_s=0.02) as pool:
        await pool.publish("base", BASE)
        alone = [await begin(pool, job).result() for job in jobs[:1]]
        await until(lambda: len(pids(tmp_path)) == 2)
        told = [begin(pool, job) for job in jobs]
        await anyio.sleep(0.1)
        kill(pids(tmp_path)[0])
        results = [await one.result() for one in told]
        assert 0 < pool.counts["repeated_samples"] <= 16
        await until(lambda: pool.room().workers == 2)
        again = [begin(pool, job) for job in jobs]
        assert sequences([await one.result() for one in again]) == sequences(results)
        assert results[0] == alone[0]
        assert pool.room().free_rows == pool.room().rows


async def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    job = a_job(n=3, stream=True, max_tokens=40, stop=["zz"])
    with standins(tmp_path, pace_s=0.01) as pool:
        await pool.publish("base", BASE)
        told = begin(pool, job)
        await told.some.wait()
        await anyio.sleep(0.1)
        kill(pids(tmp_path)[0])
        result = await told.result()
        for index, sequence in enumerate(result.sequences):
            tokens = [t for d in told.deltas if d.index == index for t in d.tokens]
            assert tuple(tokens) == sequence.tokens and len(tokens) == 40
        assert pool.counts["worker_starts"] == 2
        assert (await begin(pool, job).result()).sequences == result.sequences


async def test_a_stream_that_would_change_fails_by_name(tmp_path: Path) -> None:
    with standins(tmp_path, pace_s=0.01, shift=True) as pool:
        await pool.publish("base", BASE)
        told = begin(pool, a_job(stream=True, max_tokens=60))
        whole = begin(pool, a_job(job_id="whole", max_tokens=60))
        await told.some.wait()
        kill(pids(tmp_path)[0])
        error = await told.error()
        assert isinstance(error, EngineError) and "streamed already" in error.message
        assert len((await whole.result()).sequences[0].tokens) == 60


async def test_a_job_that_ends_its_workers_ends_after_three(tmp_path: Path) -> None:
    with standins(tmp_path, fault="draw") as pool:
        await pool.publish("base", BASE)
        error = await begin(pool, a_job(n=8, max_tokens=60)).error()
        assert isinstance(error, EngineError) and "3 workers" in error.message
        assert pool.counts["worker_starts"] >= 3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"fault": "start"}, "no such model"),
        ({"fault": "garbage"}, "no frame"),
        ({"has_version": "2"}, "standin 2, not 1"),
        ({"modules": None}, "not understood"),
    ],
)
async def test_a_worker_that_cannot_be_started_is_named(
    tmp_path: Path, how: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "LEAVE_S", 0.2)
    with standins(tmp_path, **how) as pool:
        with anyio.fail_after(kit.WAIT_S), pytest.raises(EngineError, match=words):
            await pool.publish("base", BASE)
        assert len(pool.room().faults) == 1
        with pytest.raises(EngineError, match=words):
            await pool.ready()


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with standins(tmp_path) as pool:
        for one_place in pool.places.values():
            missing = worker_process.WorkerProcess(command=["/no/such"], log=tmp_path / "log")
            one_place._opener = missing.open
        with pytest.raises(EngineError, match="/no/such cannot be run"):
            await pool.ready()


async def test_a_worker_that_is_not_ready_in_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "START_S", 0.05)
    monkeypatch.setattr(worker_process, "LEAVE_S", 0.2)
    with standins(tmp_path) as pool, pytest.raises(EngineError, match="not ready in"):
        await pool.ready()


async def test_workers_that_die_while_they_load_are_a_named_error(tmp_path: Path) -> None:
    ref = WeightsRef(base_model="letters", uri=save_adapter(tmp_path / "bad").as_uri())
    with standins(tmp_path, fault="load") as pool:
        await pool.publish("base", BASE)
        with pytest.raises(EngineError, match="died while it loaded bad"):
            await pool.publish("w", ref)
        assert (await one(pool)).tokens  # by another process
        assert [f for f in (tmp_path / "shelf").glob("*/*") if f.is_dir()] == []


async def test_a_folder_that_is_gone_fails_its_jobs_alone(tmp_path: Path) -> None:
    """Also those of others that are being drawn when it goes."""
    ref = WeightsRef(base_model="letters", uri=save_adapter(tmp_path / "a").as_uri())
    with standins(tmp_path, pace_s=0.02) as pool:
        await pool.publish("base", BASE)
        await pool.publish("w", ref)
        before = [begin(pool, a_job([i], f"before-{i}")) for i in range(3)]
        await until(lambda: pool.room().free_rows < 8)
        [folder] = [f for f in (tmp_path / "shelf").glob("*/*") if f.is_dir()]
        folder.rename(tmp_path / "elsewhere")
        behind = [begin(pool, a_job([i], f"behind-{i}", weights_id="w")) for i in range(3)]
        for told in behind:
            error = await told.error()
            assert isinstance(error, EngineError) and "no such adapter" in error.message
        assert all([(await told.result()).sequences for told in before])
        assert (await one(pool)).tokens and len(pids(tmp_path)) == 1


async def test_a_worker_that_does_not_answer_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "BEAT_S", 0.05)
    monkeypatch.setattr(place, "ANSWER_S", 0.1)
    monkeypatch.setattr(worker_process, "LEAVE_S", 0.2)
    with standins(tmp_path, fault="silent", pace_s=30.0) as pool:
        await pool.publish("base", BASE)
        [first] = pids(tmp_path)
        error = await begin(pool, a_job()).error()
        assert isinstance(error, EngineError) and "not answered `ping`" in error.message
        await gone(first)


def test_workers_end_with_the_process_that_has_started_them(tmp_path: Path) -> None:
    program = f"""
        import sys, anyio
        from pathlib import Path
        from tests.engine.cluster.kit import BASE, a_job, begin, standins, until

        async def main():
            with standins(Path(sys.argv[1]), workers=2, pace_s=0.05) as pool:
                await pool.publish("base", BASE)
                begin(pool, a_job(max_tokens=60))
                await until(lambda: pool.room().workers == 2)
                print("up", flush=True)
                await anyio.sleep({kit.WAIT_S})

        anyio.run(main)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        found = pids(tmp_path)
        assert len(found) == 2
        parent.kill()

    async def all_gone() -> None:
        for pid in found:
            await gone(pid)

    anyio.run(all_gone)
