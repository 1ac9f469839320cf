"""Loops beside which ranks and samplers are killed, in each phase: the weights stay the same.

A supervised, an on-policy and an off-policy loop train at once on the service over a group of two
ranks and a pool of two workers, which Ray places and which stand in for vLLM's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from random import Random, randrange
from typing import TYPE_CHECKING, Any

import anyio
import pytest

pytest.importorskip("ray")

import weaver_rl as rl
from tests.engine.cluster.kit import kill, until
from tests.engine.cluster.torch_standin import an_environment
from tests.rl.killable import EXAMPLES, SMALL, TASKS
from tests.rl.test_loops import Memory, without_times
from weaver import AsyncServiceClient
from weaver.config import EngineSettings
from weaver.engine.cluster.config import ClusterConfig, GroupConfig, PoolConfig
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.cluster.pooled_cluster import with_pools
from weaver.engine.torch.engine import TorchEngine
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.server.settings import Durability
from weaver_rl.algorithms.run import Run
from weaver_rl.loggers import Loggers
from weaver_rl.tasks.words import exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weaver.engine.cluster.pooled import PooledEngine

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 4
BACK_S = 60
"""In which ranks that were killed are there again."""
POLICY: dict[str, Any] = {
    **SMALL,
    "steps": STEPS,
    "groups_per_step": 2,
    "objective": rl.Objective(correction="ratio"),
}
PLAYED: dict[str, Any] = {"tasks": TASKS, "environment": rl.single_turn(exact)}
LOOPS: dict[str, Any] = {
    "supervised": partial(
        rl.supervised,
        examples=EXAMPLES,
        plan=rl.SupervisedPlan(epochs=9, steps=3 * STEPS, batch_tokens=200),
    ),
    "on_policy": partial(rl.on_policy, plan=rl.Plan(**POLICY), **PLAYED),
    "off_policy": partial(
        rl.off_policy, plan=rl.Plan(**POLICY, max_staleness=2, in_flight="never"), **PLAYED
    ),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[PooledEngine]:
    """No result depends on what else runs, as no two killings are at the same moment."""
    environment = an_environment(tmp_path / "env")
    group = GroupConfig(model="weaver-nano", ranks=2, device="cpu", threads=1, cpus=0.4)
    pool = PoolConfig(
        model="weaver-nano", workers=2, device="cpu", cpus=0.1, rows=16, environment=environment
    )
    config = ClusterConfig(address="local", trainer=(group,), pool=(pool,))
    local = TorchEngine(device="cpu", threads=1)
    ranks = ClusterEngine(local, config, home=tmp_path / "engine", deterministic=True)
    engine = with_pools(ranks, config, EngineSettings())
    yield engine
    engine.close()


@dataclass
class Phases:
    """What the engine was asked for lately."""

    begun: dict[str, anyio.Event] = field(default_factory=dict)

    def watch(self, engine: PooledEngine, name: str) -> None:
        ask = getattr(engine, name)

        def asked(*args: Any, **given: Any) -> Any:
            self.begun.pop(name, anyio.Event()).set()
            return ask(*args, **given)

        setattr(engine, name, asked)

    async def next(self, name: str) -> None:
        """Until it is asked for that."""
        await self.begun.setdefault(name, anyio.Event()).wait()


def kill_rank(engine: PooledEngine, rng: Random) -> None:
    [group] = engine.status.groups
    kill(rng.choice(group.ranks).pid)


def kill_sampler(engine: PooledEngine, rng: Random) -> None:
    """One that draws, if any does."""
    up = [one for one in engine.status.samplers if one.state == "running"]
    kill(rng.choice([one for one in up if one.rows] or up).pid)


PHASES: tuple[tuple[str, Callable[[PooledEngine, Random], None]], ...] = (
    ("forward_backward", kill_rank),
    ("sample", kill_sampler),
    ("optim_step", kill_rank),
    ("publish", kill_sampler),
    ("save", kill_rank),
)


async def killing(engine: PooledEngine, phases: Phases, rng: Random) -> None:
    """One after the other: the next when both ranks and a sampler are there again."""
    for name, victim in PHASES:
        with anyio.fail_after(BACK_S):
            await until(lambda: _is_whole(engine))
            await phases.next(name)
        await anyio.sleep(rng.uniform(0.0, 0.03))
        victim(engine, rng)


def _is_whole(engine: PooledEngine) -> bool:
    told = engine.status
    there = [group.state == "ready" and bool(group.ranks) for group in told.groups]
    return all(there) and any(one.state == "running" for one in told.samplers)


async def loops(engine: PooledEngine, home: Path, rng: Random | None) -> dict[str, Any]:
    """Of each loop its metrics, but for the times, and the digest of its last weights."""
    ended: dict[str, Any] = {}
    database = open_database(home, None)
    often = Durability(snapshot_every_s=0.3)
    given: dict[str, Any] = {"store": Journal(database), "durability": often}
    phases = Phases()
    for name, _ in PHASES:
        phases.watch(engine, name)

    async def one(client: AsyncServiceClient, name: str) -> None:
        trainer, memory = await client.create_model("weaver-nano", {"rank": 8}), Memory()
        await LOOPS[name](trainer, run=Run(loggers=Loggers(memory)))
        await trainer.save_weights_for_sampler(name)
        ended[name] = without_times(memory.rows)

    async with (
        LocalService(engine, home=home, deterministic=True, **given) as service,
        AsyncServiceClient(service=service, home=home) as client,
        anyio.create_task_group() as tasks,
    ):
        for name in LOOPS:
            tasks.start_soon(one, client, name)
        if rng is not None:
            await killing(engine, phases, rng)
            assert len(ended) < len(LOOPS), "the loops were over before"
    database.dispose()
    return {name: (rows, digest_of(home, name)) for name, rows in ended.items()}


def digest_of(home: Path, name: str) -> str:
    [file] = home.rglob(f"{name}/adapter_model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


async def test_ranks_and_samplers_killed_in_each_phase_change_no_weight(
    engine: PooledEngine, tmp_path: Path
) -> None:
    expected = await loops(engine, tmp_path / "whole", None)
    assert len({digest for _, digest in expected.values()}) == len(LOOPS)
    starts, seed = dict(engine.counts), randrange(10**6)
    saw = await loops(engine, tmp_path / "killed", Random(seed))
    for name in LOOPS:
        assert saw[name] == expected[name], f"{name}, seed {seed}"
    assert engine.counts["group_starts"] == starts["group_starts"] + 3
    assert engine.counts["worker_starts"] >= starts["worker_starts"] + 2
