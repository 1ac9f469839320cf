"""Off-policy loops over a pool: weights move while workers draw, and workers leave and return."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.engine.cluster.kit import kill, pids, save_adapter, standins
from tests.fake_engine import FakeEngine
from tests.rl.fake import vowels
from tests.rl.test_in_flight import AHEAD, keeping, until_newer
from tests.rl.test_loops import TASKS, Memory
from weaver import AsyncServiceClient
from weaver.engine.cluster.pooled import PooledEngine
from weaver.engine.cluster.weights import Shelf
from weaver.server.service import LocalService
from weaver.types import SamplingParams
from weaver_rl.algorithms.policy import off_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.loggers import Loggers
from weaver_rl.rollouts import each

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from weaver_rl.agent import Agent
    from weaver_rl.plan import Move
    from weaver_rl.types import Task


class Adapters(FakeEngine):
    """Saves the files of an adapter beside its own, for workers that look at them."""

    async def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        write = await super().save(run_id, include_optimizer=include_optimizer)

        def both(folder: Path) -> None:
            write(folder)
            for file in save_adapter(folder / "adapter").iterdir():
                file.rename(folder / file.name)
            (folder / "adapter").rmdir()
            (folder / "weaver_state.json").write_text((folder / "state.json").read_text())

        return both


class Killing:
    """Plays two turns; in the midst of the first turn of two rollouts it kills a worker."""

    def __init__(self, folder: Path, moved_on: Sequence[anyio.Event]) -> None:
        self.folder = folder
        self.moved_on = moved_on
        self.count = 0

    async def __call__(self, agent: Agent, task: Task) -> float:
        self.count += 1
        async with anyio.create_task_group() as tasks:
            if self.count in (20, 70):
                tasks.start_soon(self.kill)
            first = await agent.complete(task["prompt"])
        await until_newer(first, self.moved_on)
        return vowels(task, await agent.complete("and"))

    async def kill(self) -> None:
        await anyio.sleep(0.05)
        kill(pids(self.folder)[0])


@pytest.mark.anyio
@pytest.mark.parametrize("moves", ["turn", "reply"])
async def test_a_loop_goes_on_where_workers_are_killed(moves: Move, tmp_path: Path) -> None:
    memory = Memory()
    plan = replace(
        AHEAD,
        in_flight=moves,
        sampling=SamplingParams(max_tokens=8),
        max_logprob_gap=None,  # what a stand-in says of letters is made up
    )
    with standins(tmp_path, workers=2, pace_s=0.02) as pool:
        engine = PooledEngine(
            Adapters(models=["letters"], context_length=64),
            lambda base_model: pool,
            shelf=Shelf(tmp_path / "shelf"),
            prepare=lambda: [],
        )
        with anyio.fail_after(60):
            async with (
                LocalService(engine, home=tmp_path) as service,
                AsyncServiceClient(service=service, home=tmp_path) as client,
            ):
                trainer = await client.create_model("letters", {"rank": 4})
                moved_on = [anyio.Event() for _ in range(plan.steps + 1)]
                keeping(trainer, moved_on)
                played = each(Killing(tmp_path, moved_on))
                run = Run(loggers=Loggers(memory))
                result = await off_policy(trainer, TASKS, played, plan, run=run)
        counts: Mapping[str, Any] = pool.counts
    assert sorted(memory.rows) == list(range(1, plan.steps + 1)) and result.version == plan.steps
    for step, row in memory.rows.items():
        assert (row["rollout/count"], row["rollout/failed"]) == (16, 0)
        assert row["staleness/max"] <= min(step - 1, plan.max_staleness)
    assert counts["worker_starts"] >= 3 and counts["repeated_samples"] > 0, counts
    mixed = [row["staleness/mixed_fraction"] for row in memory.rows.values()]
    assert max(mixed) > 0, mixed
