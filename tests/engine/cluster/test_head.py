"""Ray's head ends while operations are in flight: told in seconds, and a pause until it is back."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio._backends._asyncio import WorkerThread

pytest.importorskip("ray")

from typer.testing import CliRunner

from tests.engine.cluster.kit import until
from tests.engine.cluster.nodes import nodes
from tests.engine.cluster.test_failures import GROUP, NAME, opened
from weaver import AsyncServiceClient
from weaver.cli import app
from weaver.engine.cluster.config import ClusterConfig
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import EngineError
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.types import Datum, LoraConfig

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.cluster.nodes import Nodes

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]
TEXT = [[5 + (i * k) % 200 for i in range(180)] for k in range(1, 41)]
DATUMS = [Datum(model_input=t[:-1], loss_fn_inputs={"target_tokens": t[1:]}) for t in TEXT]
TOLD_S = 40.0
"""In which the end of the head is known; it takes a part of a second where machines are idle."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def loop_of(engine: ClusterEngine, home: Path, disturbed: Any = None) -> list[Any]:
    """What a client sees of three steps; `disturbed` begins with the second."""
    seen = list[Any]()
    database = open_database(home, None)
    with anyio.fail_after(240):
        async with (
            LocalService(engine, home=home, store=Journal(database)) as service,
            AsyncServiceClient(service=service, home=home) as client,
            anyio.create_task_group() as tasks,
        ):
            trainer = await client.create_model("weaver-nano", {"rank": 4, "seed": 0})
            for step in range(3):
                passing = trainer.forward_backward(DATUMS, "cross_entropy")
                if step == 1 and disturbed is not None:
                    tasks.start_soon(disturbed, client)
                stepping = trainer.optim_step({"learning_rate": 1e-2})
                seen += [dict((await passing).metrics), dict((await stepping).metrics)]
    database.dispose()
    return seen


async def test_a_head_that_ends_is_a_pause_and_then_a_named_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Ray that was started here, and of one that was joined; both begin anew."""
    monkeypatch.setattr(WorkerThread, "MAX_IDLE_TIME", 0)  # a Ray must not end with its thread
    engine = opened(tmp_path / "here", GROUP(ranks=2))
    group = engine._groups[NAME]

    async def killed(_: AsyncServiceClient) -> None:
        from ray._private.worker import _global_node

        await anyio.sleep(0.3)
        os.kill(_global_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)

    try:
        undisturbed = await loop_of(engine, tmp_path / "undisturbed")
        assert [one["step"] for one in undisturbed[1::2]] == [1, 2, 3]
        assert await loop_of(engine, tmp_path / "killed", killed) == undisturbed
        assert group.starts == 2
    finally:
        engine.close()
    with nodes() as ray_nodes:
        await of_a_joined_one(ray_nodes, tmp_path, undisturbed)


async def of_a_joined_one(ray_nodes: Nodes, folder: Path, undisturbed: list[Any]) -> None:
    ray_nodes.join(1)
    config = ClusterConfig(address=ray_nodes.address, trainer=(GROUP(ranks=2),))
    engine = ClusterEngine(TorchEngine(device="cpu", threads=1), config, home=folder / "joined")
    group = engine._groups[NAME]

    async def gone(client: AsyncServiceClient) -> None:
        await anyio.sleep(0.3)
        began = time.monotonic()
        await anyio.to_thread.run_sync(ray_nodes.remove, 0)
        await until(lambda: "nothing listens" in (group.waits_for or ""))
        assert time.monotonic() - began < TOLD_S
        asked = ["cluster", "status", "--folder", str(engine.folder)]
        told = CliRunner().invoke(app, asked).output
        assert "waits for Ray's " in told and f"nothing listens at '{ray_nodes.address}'" in told
        sampler = await client.create_sampling_client(base_model="weaver-nano")
        assert (await sampler.sample([1, 2], {"max_tokens": 2})).sequences  # others go on
        await anyio.to_thread.run_sync(ray_nodes.start)
        await anyio.to_thread.run_sync(ray_nodes.join, 1)

    try:
        assert await loop_of(engine, folder / "gone", gone) == undisturbed
        assert group.starts == 2
        ray_nodes.remove(0)
        group.config = group.config.model_copy(update={"place_s": 4.0})
        began = time.monotonic()
        run = LoraConfig(rank=4)
        for words in ("have ended", "no room for weaver-nano#0 in 4 s: Ray's "):
            with pytest.raises(EngineError, match=words):
                await engine.create_run(
                    "late", "weaver-nano", training_mode="lora", lora_config=run, seed=0
                )
        assert time.monotonic() - began < TOLD_S
    finally:
        engine.close()
