"""Nodes leave and join while a client trains: a pause, and every number as if none had."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

pytest.importorskip("ray")

from typer.testing import CliRunner

from tests.engine.cluster.kit import gone, until
from tests.engine.cluster.nodes import nodes
from tests.engine.cluster.torch_standin import an_environment
from weaver import AsyncServiceClient
from weaver.cli import app
from weaver.config import EngineSettings
from weaver.engine.cluster.config import ClusterConfig, GroupConfig, PoolConfig
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.cluster.group import TrainerGroup
from weaver.engine.cluster.pooled_cluster import with_pools
from weaver.engine.cluster.status import read_status
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import ConfigError
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.types import Datum, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.engine.cluster.nodes import Nodes
    from weaver.engine.cluster.pooled import PooledEngine

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]
MODEL = "weaver-nano"
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
DRAWN = {"max_tokens": 24, "ignore_eos": True}
STEPS = 3


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Nodes]:
    with nodes() as made:
        yield made


@pytest.fixture(scope="module")
def engine(ray_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PooledEngine]:
    """Two ranks that do not fit one node, and two samplers beside them."""
    part = {"model": MODEL, "device": "cpu"}
    config = ClusterConfig(
        address=ray_nodes.address,
        trainer=(GroupConfig(**part, ranks=2, cpus=0.6, threads=1),),
        pool=(
            PoolConfig(
                **part,
                workers=2,
                cpus=0.2,
                rows=16,
                environment=an_environment(tmp_path_factory.mktemp("made") / "env"),
            ),
        ),
    )
    local = TorchEngine(device="cpu", threads=1)
    ranks = ClusterEngine(local, config, home=tmp_path_factory.mktemp("home"))
    engine = with_pools(ranks, config, EngineSettings())
    yield engine
    engine.close()


async def loop_of(
    engine: PooledEngine, home: Path, disturbed: Callable[[int], Awaitable[None]] | None = None
) -> list[Any]:
    """All that a client sees of some steps; `disturbed` runs beside each."""
    seen = list[Any]()
    database = open_database(home, None)
    with anyio.fail_after(240):
        async with (
            LocalService(engine, home=home, store=Journal(database)) as service,
            AsyncServiceClient(service=service, home=home) as client,
            anyio.create_task_group() as tasks,
        ):
            trainer = await client.create_model(MODEL, {"rank": 4, "seed": 0})
            for step in range(STEPS):
                if disturbed is not None:
                    tasks.start_soon(disturbed, step)
                sampler = await trainer.save_weights_and_get_sampling_client()
                drawn = await sampler.sample(PROMPTS, {**DRAWN, "seed": step}, num_samples=4)
                datums = [
                    scored(prompt, one.tokens, one.logprobs)
                    for prompt, result in zip(PROMPTS, drawn, strict=True)
                    for one in result.sequences
                ]
                passing = trainer.forward_backward(datums * 20, "importance_sampling")
                stepping = trainer.optim_step({"learning_rate": 1e-2})
                done = await passing
                seen.append(
                    ([one.sequences for one in drawn], done, dict((await stepping).metrics))
                )
    database.dispose()
    return seen


def scored(prompt: list[int], tokens: tuple[int, ...], logprobs: tuple[float, ...]) -> Datum:
    """A sample; the larger its tokens, the better."""
    before = len(prompt) - 1
    row = [*prompt, *tokens]
    return Datum(
        model_input=row[:-1],
        loss_fn_inputs={
            "target_tokens": row[1:],
            "logprobs": [0.0] * before + list(logprobs),
            "advantages": [0.0] * before + [sum(tokens) / len(tokens) / 128 - 1] * len(tokens),
        },
    )


@pytest.fixture(scope="module")
def undisturbed(
    engine: PooledEngine, ray_nodes: Nodes, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    """A loop over two nodes, of which none leaves."""
    ray_nodes.join(1)
    ray_nodes.join(1)
    seen = anyio.run(loop_of, engine, tmp_path_factory.mktemp("undisturbed"))
    assert [metrics["step"] for _, _, metrics in seen] == [1, 2, 3]
    return seen


async def test_nodes_leave_and_join_during_a_loop(
    engine: PooledEngine, ray_nodes: Nodes, tmp_path: Path, undisturbed: list[Any]
) -> None:
    trainer = engine.trainer
    assert isinstance(trainer, ClusterEngine)
    [group] = trainer._groups.values()
    starts = group.starts

    async def disturbed(step: int) -> None:
        if step == 1:
            await anyio.sleep(0.2)
            await anyio.to_thread.run_sync(ray_nodes.remove, 2)
            await until(lambda: group.state == "waiting" and group.waits_for is not None)
            asked = ["cluster", "status", "--folder", str(trainer.folder)]
            told = CliRunner().invoke(app, asked).output
            assert "waits for 2 x (0.6 CPU); free" in told and "at most on one node" in told
            await anyio.to_thread.run_sync(ray_nodes.join, 1)

    assert await loop_of(engine, tmp_path, disturbed) == undisturbed
    assert group.starts == starts + 1


SERVER = """
import sys, anyio
from pathlib import Path
from tests.engine.cluster.test_nodes import a_run
from weaver.engine.cluster.config import ClusterConfig, GroupConfig
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.torch.engine import TorchEngine
group = GroupConfig(model="weaver-nano", device="cpu", threads=1, cpus=0.5)
config = ClusterConfig(address=sys.argv[1], trainer=(group,))
local = TorchEngine(device="cpu", threads=1)
engine = ClusterEngine(local, config, home=Path(sys.argv[2]))
anyio.run(a_run, engine)
print("ready", flush=True)
anyio.run(anyio.sleep_forever)
"""


def a_server(address: str, home: Path) -> subprocess.Popen[str]:
    """A process with a run."""
    program = [sys.executable, "-c", SERVER, address, str(home)]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    return server


async def a_run(engine: ClusterEngine) -> None:
    lora = LoraConfig(rank=4)
    await engine.create_run("other", MODEL, training_mode="lora", lora_config=lora, seed=0)


async def test_two_servers_on_one_ray_do_not_disturb_each_other(
    engine: PooledEngine, ray_nodes: Nodes, tmp_path: Path, undisturbed: list[Any]
) -> None:
    """One of them is killed while the other trains."""
    trainer = engine.trainer
    assert isinstance(trainer, ClusterEngine)
    [group] = trainer._groups.values()
    starts = group.starts
    ray_nodes.join(1)
    other = await anyio.to_thread.run_sync(a_server, ray_nodes.address, tmp_path)
    [its] = read_status(tmp_path / "cluster").groups
    assert its.state == "ready" and len(list((tmp_path / "cluster").glob("live-*"))) == 1

    async def disturbed(step: int) -> None:
        if step == 1:
            other.kill()

    try:
        assert await loop_of(engine, tmp_path / "one", disturbed) == undisturbed
        assert group.starts == starts
        await gone(its.ranks[0].pid)
    finally:
        other.kill()
        other.communicate()


VERSION = """
import importlib.util, sys
class Other:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                module.__version__ = "2.0.0+of.this.node"
            spec.loader.exec_module = exec_module
            return spec
sys.meta_path.insert(0, Other())
"""


async def test_another_torch_on_a_machine_is_named_before_anything_trains(
    engine: PooledEngine, ray_nodes: Nodes, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(VERSION)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ray_nodes.join(3)
    ray_nodes.join(3, {"PYTHONPATH": paths})
    trainer = engine.trainer
    assert isinstance(trainer, ClusterEngine)
    group = TrainerGroup(
        "mixed",
        GroupConfig(model=MODEL, device="cpu", ranks=2, cpus=2),
        cluster=trainer._cluster,
        source=trainer.local.facts(MODEL).source,
        deterministic=False,
        proof=trainer._proof,
        changed=lambda: None,
    )
    with pytest.raises(ConfigError, match=r"rank \d on .* has torch .*, rank 0 on .* has 2\."):
        await group.create_run("run", "lora", LoraConfig(rank=4), 0)
    assert group.ranks is None and group.state == "stopped"
