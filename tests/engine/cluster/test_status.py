"""`weaver cluster status`, and what is loaded of Ray where nobody asked for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from tests.engine.cluster.kit import BASE, a_job, begin, kill, pids, standins, until
from tests.fake_engine import FakeEngine
from weaver.cli import app
from weaver.engine.cluster.pooled import PooledEngine
from weaver.engine.cluster.status import Status, read_status
from weaver.engine.cluster.weights import Shelf
from weaver.engine.status import (
    EngineStatus,
    GroupStatus,
    PoolStatus,
    RankStatus,
    SamplerStatus,
)
from weaver.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

WAITS = "2 x (1 CPU, 1 GPU); free 0 CPU, of 2 CPU in all"


def status(*, pid: int) -> Status:
    rank = RankStatus(host="a", pid=7, device="cpu", memory_bytes=500_000_000)
    group = GroupStatus(
        name="nano#0",
        model="nano",
        mode="replicated",
        ranks_wanted=1,
        state="ready",
        since=time.time(),
        waits_for=None,
        starts=2,
        last_loss="forward_backward: ActorDiedError",
        runs=3,
        ranks=(rank,),
    )
    waiting = {"name": "large#0", "state": "waiting", "waits_for": WAITS, "ranks": ()}
    groups = (group, group.model_copy(update=waiting))
    sampler = SamplerStatus(
        name="nano/sampler-0",
        model="nano",
        state="running",
        since=time.time(),
        waits_for=None,
        starts=2,
        last_loss="it has ended",
        host="b",
        pid=8,
        rows=3,
        memory_bytes=2_500_000_000,
    )
    pool = PoolStatus(model="nano", workers=1, rows=64, free_rows=61, waiting=2)
    return Status(
        host=os.uname().nodename,
        pid=pid,
        at=time.time(),
        ray="Ray",
        groups=groups,
        pools=(pool,),
        samplers=(sampler,),
    )


def test_groups_ranks_and_what_waits_are_shown(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(status(pid=os.getpid()).model_dump_json())
    done = CliRunner().invoke(app, ["cluster", "status", "--folder", str(tmp_path)])
    assert done.exit_code == 0
    assert f"waits for {WAITS}" in done.output
    assert "last lost: forward_backward: ActorDiedError" in done.output
    assert "started 2 times, process 8 on b, 3 rows, 2.50 GB\n  last lost: it" in done.output
    assert "samplers of nano: 1 run, 61 of 64 rows are free, 2 jobs wait" in done.output
    assert "rank 0   a process 7 on cpu, 0.50 GB" in done.output


@pytest.mark.anyio
async def test_what_a_server_has_started_itself_is_told(tmp_path: Path) -> None:
    with standins(tmp_path, workers=2, pace_s=0.02) as pool:
        engine = PooledEngine(
            FakeEngine(), lambda model: pool, shelf=Shelf(tmp_path / "shelf"), prepare=lambda: []
        )
        assert engine.status == EngineStatus()
        await engine.pool("letters").publish("base", BASE)
        await until(lambda: all(sampler.memory_bytes for sampler in engine.status.samplers))
        job = begin(pool, a_job(n=3))
        await until(lambda: any(sampler.rows for sampler in engine.status.samplers))
        told = engine.status
        assert [(s.model, s.state, s.starts) for s in told.samplers] == [
            ("letters", "running", 1)
        ] * 2
        assert {s.name for s in told.samplers} == {"letters/worker-0", "letters/worker-1"}
        [of_pool] = told.pools
        assert (of_pool.workers, of_pool.rows - of_pool.free_rows) == (2, 3)
        await job.result()
        [first, _] = pids(tmp_path)
        kill(first)
        await until(lambda: any(sampler.starts == 2 for sampler in engine.status.samplers))
        assert any("it has ended" in (s.last_loss or "") for s in engine.status.samplers)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*status\.json"):
        read_status(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "status.json").write_text(status(pid=ended.pid).model_dump_json())
    with pytest.raises(ConfigError, match=f"the server {ended.pid}.* has ended"):
        read_status(tmp_path)


def test_nothing_of_ray_is_loaded_where_no_cluster_is_asked_for() -> None:
    code = (
        "import sys, weaver.cli.serve, weaver.server.serve, weaver.engine.torch.engine, "
        "weaver.engine.cluster.config; print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
