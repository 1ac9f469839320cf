"""The cluster engine with two gloo ranks on a Ray: as an engine, and below the service."""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import anyio
import pytest

pytest.importorskip("ray")

from tests.contracts import test_service_order, test_service_runs, test_service_samples
from tests.contracts.caller import Caller
from tests.engine.cluster.kit import vllm_environment
from tests.engine.cluster.test_ranks import data_of
from tests.engine.cluster.torch_standin import an_environment
from tests.engine.conftest import job
from weaver.config import EngineSettings
from weaver.engine.cluster.config import ClusterConfig, GroupConfig, PoolConfig
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.cluster.pooled import PooledEngine
from weaver.engine.cluster.pooled_cluster import with_pools
from weaver.engine.torch.catalog import NANO
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import InvalidParamsError, NoGradientsError
from weaver.losses import LOSSES
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.types import AdamParams, LoraConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from weaver.engine.base import Engine
    from weaver.protocol import Service

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(240)]
ADAM = AdamParams(learning_rate=1e-2)
MODELS = {"fake": NANO, "other": NANO}


def local() -> TorchEngine:
    return TorchEngine(MODELS, allow_paths=False, device="cpu", threads=1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


VLLM = pytest.param("vllm", marks=pytest.mark.timeout(900))
"""It takes minutes to start where others compute, too."""


@pytest.fixture(scope="module", params=["replicated", "fsdp", "pooled", VLLM])
def engine(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ClusterEngine | PooledEngine]:
    """`pooled`: samples come from workers that Ray places and that stand in for vLLM's; `vllm`:
    from vLLM's."""
    mode = "fsdp" if request.param == "fsdp" else "replicated"
    group = partial(GroupConfig, device="cpu", threads=1, cpus=0.4, mode=mode)
    config = ClusterConfig(
        address="local", trainer=(group(model="fake", ranks=2), group(model="other"))
    )
    if request.param in POOLED:
        if request.param == "vllm":
            workers, environment = 1, vllm_environment()
        else:
            workers, environment = 2, an_environment(tmp_path_factory.mktemp("made") / "env")
        pool = partial(PoolConfig, device="cpu", cpus=0.1, rows=16, environment=environment)
        pools = pool(model="fake", workers=workers, cache_gb=0.2), pool(model="other", cache_gb=0.2)
        config = config.model_copy(update={"pool": pools})
    ranks = ClusterEngine(local(), config, home=tmp_path_factory.mktemp("home"))
    engine = with_pools(ranks, config, EngineSettings()) if config.pool else ranks
    if request.param == "vllm":  # its start takes longer than tests of the service wait
        assert isinstance(engine, PooledEngine)
        anyio.run(engine.pool("fake").ready)
    yield engine
    engine.close()


POOLED = ("pooled", "vllm")
VLLM_LACKS = {
    "test_a_run_describes_itself": "full fine-tuning",
    "test_a_checkpoint_of_another_architecture_is_refused": "full fine-tuning",
    "test_a_stream_is_the_sample_in_pieces": "top_logprobs",
}
"""What tests of the service use that pools refuse by name."""


@pytest.fixture(autouse=True)
def possible(request: pytest.FixtureRequest) -> None:
    lacks = VLLM_LACKS.get(request.node.originalname)
    if lacks and request.node.callspec.params.get("engine") in POOLED:
        pytest.skip(f"pools refuse {lacks}")


async def new_run(engine: Engine, run_id: str, *, rank: int = 8, seed: int = 0) -> str:
    config = LoraConfig(rank=rank, seed=seed)
    await engine.create_run(run_id, "fake", training_mode="lora", lora_config=config, seed=seed)
    return run_id


@pytest.mark.parametrize("loss_fn", sorted(n for n, one in LOSSES.items() if None in one.heads))
async def test_steps_are_those_of_one_process(engine: ClusterEngine, loss_fn: str) -> None:
    seen = []
    one = local()
    for each in (one, engine):
        a, b = await new_run(each, "a"), await new_run(each, "b", rank=16, seed=1)
        seen.append([])
        for seed in range(2):
            done = await each.forward_backward(
                [
                    job(a, data_of(loss_fn, 30, 12, 5, seed=seed), loss_fn),
                    job(b, data_of("cross_entropy", 9, 14, seed=seed)),
                ]
            )
            steps = await each.optim_step([(a, ADAM), (b, ADAM)])
            seen[-1] += [dict(answer.metrics) for answer in (*done, *steps)]
        for run_id in (a, b):
            await each.delete_run(run_id)
    one.close()
    for ours, theirs in zip(*seen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)  # Adam makes signs of rounding
    first = seen[0][2]["grad_norm"]
    assert seen[1][2]["grad_norm"] == pytest.approx(first, rel=1e-6)


async def test_checkpoints_and_samples_are_those_of_one_process(
    engine: ClusterEngine, tmp_path: Path
) -> None:
    run_id = await new_run(engine, "saved")
    await engine.forward_backward([job(run_id, data_of("cross_entropy", 30, 12))])
    await engine.optim_step([(run_id, ADAM)])
    write = await engine.save(run_id, include_optimizer=True)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    await anyio.to_thread.run_sync(write, folder)
    ref = await engine.snapshot(run_id)
    assert ref.uri is not None and ref.uri.startswith("file:///") and ref.version == 1
    assert await engine.publish("cluster", ref) == 1
    one = local()
    await new_run(one, run_id, seed=9)
    assert await one.load(run_id, folder, include_optimizer=True) == 1
    assert await one.publish("one", await one.snapshot(run_id)) == 1
    await engine.optim_step([(run_id, ADAM)])
    assert await engine.load(run_id, folder, include_optimizer=True) == 1
    await engine.delete_run(run_id)
    one.close()


async def test_what_users_can_mend_is_answered_and_harms_nobody(engine: ClusterEngine) -> None:
    starts = engine.counts["group_starts"]
    with pytest.raises(InvalidParamsError, match="rank"):
        await new_run(engine, "large", rank=100_000)
    run_id = await new_run(engine, "mended")
    [refused] = await engine.optim_step([(run_id, ADAM)])
    assert isinstance(refused, NoGradientsError)
    await engine.delete_run(run_id)
    assert engine.counts["group_starts"] <= max(starts, 1)


@pytest.fixture
async def service(engine: ClusterEngine, home: Path) -> AsyncIterator[Service]:
    database = open_database(home, None)
    async with LocalService(engine, home=home, store=Journal(database)) as service:
        yield service
    database.dispose()


@pytest.fixture
async def caller(service: Service) -> Caller:
    return await Caller.open(service)


def on_ranks(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    async def run(*args: Any, **given: Any) -> None:
        await test(*args, **given)

    return run


OF_THE_FAKE = {"engine", "gate", "open_service", "monkeypatch"}
"""What a test asks for that looks into the fake engine, or opens services of its own."""
OF_ITS_MODELS = {
    "test_models",
    "test_training_lowers_the_loss",
    "test_a_base_model_is_sampled",
    "test_likeliest_tokens_and_targets_are_told_of_prompt_and_samples",
    "test_text_and_chat_are_encoded_by_the_model",
    "test_bad_requests_end_by_name",
}
"""What a test takes for given: the names, the vocabulary, the context, how quickly they learn."""
for suite in (test_service_order, test_service_runs, test_service_samples):
    for name, tested in vars(suite).items():
        mine = name.startswith("test_") and name not in OF_ITS_MODELS
        if mine and not OF_THE_FAKE & {*inspect.signature(tested).parameters}:
            globals()[name] = on_ranks(tested)
del tested
