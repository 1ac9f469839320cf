"""Samplers that a real Ray places: processes that stand in for vLLM's workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.engine.cluster.kit import (
    BASE,
    COMMAND,
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
from weaver.engine.cluster.config import ClusterConfig, GroupConfig
from weaver.engine.cluster.placed_worker import PlacedWorker
from weaver.engine.cluster.placement import Cluster, Room
from weaver.errors import EngineError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
PROOF = "this one"


@pytest.fixture
def anyio_backend() -> str:
    """The pool has a loop of its own."""
    return "asyncio"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    config = ClusterConfig(address="local", trainer=(GroupConfig(model="none", cpus=0.1),))
    cluster = Cluster.open(config)
    yield cluster
    cluster.close()


Placing = Callable[..., PlacedWorker]


@pytest.fixture
def placing(cluster: Cluster, tmp_path: Path) -> Placing:
    """Makes workers by their names."""
    (tmp_path / "proof").write_text(PROOF)

    def make(name: str, **given: Any) -> PlacedWorker:
        how: dict[str, Any] = {
            "bundle": {"CPU": 0.1},
            "command": COMMAND,
            "environment": None,
            "wanted": {},
            "proof": (tmp_path / "proof", PROOF),
            "place_s": 60.0,
        }
        return PlacedWorker(
            name, cluster=cluster, log=tmp_path / "logs" / f"{name}.log", **{**how, **given}
        )

    return make


async def test_samples_are_those_of_workers_here(placing: Placing, tmp_path: Path) -> None:
    jobs = [a_job([i], str(i), n=2, seed=i, prompt_logprobs=True) for i in range(6)]
    seen = []
    for name, opener in (("here", None), ("ray", lambda name: placing(name).open)):
        with standins(tmp_path / name, workers=2, opener=opener) as pool:
            await pool.publish("base", BASE)
            told = [begin(pool, job) for job in jobs]
            seen.append([(await each.result()).sequences for each in told])
            left = pids(tmp_path / name)
        for pid in left:
            await gone(pid)
    assert seen[0] == seen[1]


async def test_adapters_are_read_from_the_shared_folder(placing: Placing, tmp_path: Path) -> None:
    with standins(tmp_path, opener=lambda name: placing(name).open) as pool:
        folder = save_adapter(tmp_path / "adapter")
        ref = WeightsRef(base_model="letters", uri=folder.as_uri())
        assert await pool.publish("w", ref) == 3
        first = await one(pool, weights_id="w")
        assert first.weights_version == 3
        deltas = begin(pool, a_job(weights_id="w", stream=True))
        assert (await deltas.result()).sequences[0].tokens == first.tokens
        assert [token for delta in deltas.deltas for token in delta.tokens] == list(first.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "starter"])
async def test_a_killed_one_is_started_again_and_its_samples_are_repeated(
    placing: Placing, tmp_path: Path, who: str
) -> None:
    made = []

    def opener(name: str) -> Any:
        made.append(placing(name))
        return made[-1].open

    with standins(tmp_path, opener=opener, pace_s=0.05) as pool:
        await pool.publish("base", BASE)
        alone = await one(pool)
        job = begin(pool, a_job(n=3))
        await until(lambda: pool.room().free_rows < 8)
        [pid], ground = pids(tmp_path), made[0].ground
        assert made[0].pid == pid and ground is not None
        kill(pid if who == "worker" else ground.pid)
        again = await job.result()
        await gone(pid)
        assert again.sequences[0].tokens == alone.tokens
        assert pool.counts["repeated_samples"] == 3
        assert made[0].starts == 2 and made[0].state == "running"
        assert "it has ended" in (made[0].last_loss or "")


@pytest.mark.slow
async def test_without_room_it_waits_says_for_what_and_fails_in_time(
    cluster: Cluster, placing: Placing, tmp_path: Path
) -> None:
    taken = Room(cluster.session, {"CPU": float(os.cpu_count() or 1)}, 1)
    assert taken.wait()
    worker = placing("late", place_s=3.0)
    try:
        with standins(tmp_path, opener=lambda name: worker.open) as pool:
            with pytest.raises(EngineError, match=r"no room for late in 3 s: 1 x \(0.1 CPU\)"):
                await pool.publish("base", BASE)
            await until(lambda: worker.state == "waiting" and worker.waits_for is not None)
            assert "free 0 CPU" in (worker.waits_for or "")
            taken.give_back()
            await until(lambda: pool.room().workers == 1)
            assert worker.state == "running"
            await pool.publish("base", BASE)
            assert (await one(pool)).tokens
    finally:
        taken.give_back()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"proof": (Path("/nowhere/proof"), "x")}, "does not see /nowhere, which has to be"),
        ({"environment": Path("/nowhere")}, "there is none in /nowhere; there, run `weaver"),
        ({"command": ["/no/such/program"]}, "No such file or directory: '/no/such/program'"),
    ],
)
async def test_what_keeps_one_from_starting_is_named(
    placing: Placing, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    with standins(tmp_path, opener=lambda name: placing(name, **given).open) as pool:
        with pytest.raises(EngineError, match=words):
            await pool.publish("base", BASE)


@pytest.mark.slow
async def test_one_that_stopped_is_killed_with_its_pool(placing: Placing, tmp_path: Path) -> None:
    with standins(tmp_path, opener=lambda name: placing(name).open) as pool:
        await pool.publish("base", BASE)
        [pid] = pids(tmp_path)
        os.kill(pid, signal.SIGSTOP)
    await gone(pid)
