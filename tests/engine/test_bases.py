"""Several base models in memory for only some of them: the same numbers, and nobody harmed."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import transformers

from tests.engine.conftest import DEVICE, LORA, SIZES, datum, job, save_tiny, sequences
from tests.engine.sampler_kit import sample_job, save_tokenizer
from weaver.engine.base import SampleProgress, WeightsRef
from weaver.engine.sources import ModelSource
from weaver.engine.torch import model_room
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import (
    ClosedError,
    ConfigError,
    QuotaExceededError,
    UnknownModelError,
    UnsupportedError,
)
from weaver.types import AdamParams, SampleResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.anyio
NAMES = ("one", "two", "three")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of the same size and of different kinds, each with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    configs = (
        transformers.LlamaConfig(**SIZES),
        transformers.Qwen2Config(**SIZES),
        transformers.Qwen3Config(**SIZES, head_dim=8),
    )
    for name, config in zip(NAMES, configs, strict=True):
        save_tiny(config, root / name)
        save_tokenizer(root / name)
    return {name: root / name for name in NAMES}


@contextmanager
def engine_of(folders: Mapping[str, Any], *, holds: float = 0, **how: Any) -> Iterator[TorchEngine]:
    """An engine with room for so many of the models; 0 is as by default."""
    probe = TorchEngine(folders, allow_paths=False, device=DEVICE.type, dtype="float32")
    size = max(probe.get_model(name).size_bytes for name in folders)
    how = {"device": DEVICE.type, "dtype": "float32", "threads": 1, **how}
    engine = TorchEngine(folders, allow_paths=False, model_memory_gb=holds * size / 1e9, **how)
    try:
        yield engine
    finally:
        engine.close()


async def sampled(engine: TorchEngine, weights_id: str, **how: Any) -> SampleResult:
    """What a sample answers; raises its error."""
    done, last = anyio.Event(), list[SampleProgress]()

    def tell(progress: SampleProgress) -> None:
        if progress.error is not None or progress.result is not None:
            last.append(progress)
            done.set()

    prompt = how.pop("prompt", [5, 9, 7, 11, 4])
    how = {"seed": 3, **how}
    engine.sample(sample_job(prompt, f"{weights_id} {how}", weights_id=weights_id, **how), tell)
    await done.wait()
    if last[0].error is not None:
        raise last[0].error
    assert last[0].result is not None
    return last[0].result


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        for _ in range(10_000):
            if true():
                return
            await anyio.sleep(0.002)


async def create(engine: TorchEngine, run_id: str, base_model: str, mode: Any = "lora") -> None:
    lora = LORA if mode == "lora" else None
    await engine.create_run(run_id, base_model, training_mode=mode, lora_config=lora, seed=0)


async def trained(engine: TorchEngine, name: str, *, steps: int = 3) -> list[object]:
    """All that a run on a base model of this name sees, and samples of it and of its base."""
    await create(engine, f"run {name}", name)
    await engine.publish(f"base:{name}", WeightsRef(base_model=name))
    seen: list[object] = []
    for step in range(steps):
        data = [datum(tokens) for tokens in sequences(9, 20, seed=step)]
        [done] = await engine.forward_backward([job(f"run {name}", data)])
        assert not isinstance(done, Exception), done
        seen += [done.metrics, [o["logprobs"].to_numpy().tolist() for o in done.loss_fn_outputs]]
        rate = AdamParams(learning_rate=1e-2)
        seen += [one.metrics for one in await engine.optim_step([(f"run {name}", rate)])]  # type: ignore[union-attr]
        await engine.publish(f"{name} {step}", await engine.snapshot(f"run {name}"))
        for weights_id in (f"{name} {step}", f"base:{name}"):
            result = await sampled(engine, weights_id, n=2)
            seen += [(s.tokens, s.logprobs) for s in result.sequences]
    return seen


async def test_bases_in_turns_give_the_same_numbers_as_alone(folders: dict[str, Path]) -> None:
    alone = []
    for name in NAMES:
        with engine_of({name: folders[name]}) as engine:
            alone.append(await trained(engine, name))
    for holds in (1, 2):
        saw: dict[str, list[object]] = {}

        async def see(name: str, engine: TorchEngine, saw: dict[str, list[object]] = saw) -> None:
            saw[name] = await trained(engine, name)

        with engine_of(folders, holds=holds) as engine, anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for name in NAMES:
                    tasks.start_soon(see, name, engine)
            assert [saw[name] for name in NAMES] == alone
            assert engine.counts["model_loads"] > 3
            there = engine.counts["model_loads"] - engine.counts["model_unloads"]
            assert there == engine.gauges["base_models"] == holds
            assert engine.gauges["waiting_for_models"] == 0


async def test_running_samples_keep_their_model_and_those_that_wait_get_their_turn(
    folders: dict[str, Path],
) -> None:
    with engine_of(folders, holds=1) as engine, anyio.fail_after(60):
        for name in ("one", "two"):
            await engine.publish(name, WeightsRef(base_model=name))
        ended: list[str] = []

        async def draw(name: str, label: str, **how: Any) -> None:
            await sampled(engine, name, **how)
            ended.append(label)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: draw("one", "first", max_tokens=200, stop_token_ids=()))
            await until(lambda: engine.sampler.busy)
            tasks.start_soon(lambda: draw("two", "second", max_tokens=3))
            for number in range(60):  # there are always some of the first model
                tasks.start_soon(lambda n=number: draw("one", f"one {n}", seed=n, max_tokens=30))
                await anyio.sleep(0.01)
        assert len(ended) == 62
        assert "first" in ended[: ended.index("second")]
        assert ended.index("second") < 61, "it waited for all that came behind it"


async def test_what_waits_for_too_long_is_refused_by_name(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model_room, "WAIT_S", 0.3)
    with engine_of(folders, holds=1) as engine, anyio.fail_after(30):
        await engine.publish("one", WeightsRef(base_model="one"))
        await create(engine, "run", "two")
        await engine.publish("two", await engine.snapshot("run"))
        engine._store.room.users.append(lambda: {"one"})
        await engine.publish("one again", WeightsRef(base_model="one"))
        caplog.set_level(logging.INFO)
        with pytest.raises(
            QuotaExceededError, match=r"no memory for .* of two beside samples of one"
        ):
            await engine.forward_backward([job("run", [datum([5, 6, 7])])])
        with pytest.raises(QuotaExceededError, match="beside samples of one"):
            await sampled(engine, "two")
        assert "two waits: no memory beside one" in caplog.text
        assert (await sampled(engine, "one")).sequences
        engine._store.room.users.pop()
        assert (await sampled(engine, "two")).sequences
        [done] = await engine.forward_backward([job("run", [datum([5, 6, 7])])])
        assert not isinstance(done, Exception)


async def test_a_sample_that_waits_can_be_cancelled_and_an_engine_closed(
    folders: dict[str, Path],
) -> None:
    with engine_of(folders, holds=1) as engine, anyio.fail_after(30):
        await create(engine, "run", "two")
        await engine.publish("two", await engine.snapshot("run"))
        await engine.publish("one", WeightsRef(base_model="one"))
        engine._store.room.users.append(lambda: {"one"})
        told: list[object] = []
        drop = engine.sample(sample_job([5, 6], weights_id="two"), told.append)
        await until(lambda: engine.gauges["waiting_for_models"])
        drop()
        await until(lambda: not engine.gauges["waiting_for_models"])
        assert not told

        async def ask() -> None:
            with pytest.raises(ClosedError):
                await engine.forward_backward([job("run", [datum([5, 6, 7])])])
            told.append("closed")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await until(lambda: engine.gauges["waiting_for_models"])
            engine.close()
        assert told == ["closed"]


async def test_first_uses_at_once_load_a_model_once(folders: dict[str, Path]) -> None:
    with engine_of(folders, holds=2) as engine, anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(create, engine, f"run {number}", "one")
                ref = WeightsRef(base_model="one")
                tasks.start_soon(engine.publish, f"base {number}", ref)
        assert engine.counts["model_loads"] == 1


async def test_names_of_one_model_share_it(folders: dict[str, Path]) -> None:
    names = {"org/one": folders["one"], "other": folders["one"], "two": folders["two"]}
    with engine_of(names, holds=1) as engine, anyio.fail_after(30):
        await create(engine, "a", "org/one")
        await create(engine, "b", "other")
        assert engine.loaded_models == {"org/one", "other"}
        assert engine.lane("a", "org/one") == engine.lane("b", "other") != engine.lane("c", "two")
        assert engine.counts["model_loads"] == 1


async def test_a_model_that_cannot_be_loaded_leaves_the_others_as_they_are(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["two"], broken)
    (broken / "model.safetensors").write_bytes(b"nothing of the kind")
    names = {"one": folders["one"], "broken": broken}
    with engine_of(names, holds=1) as engine, anyio.fail_after(30):
        await create(engine, "run", "one")
        data = [datum([5, 6, 7, 8])]
        [before] = await engine.forward_backward([job("run", data)])
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="weights of broken cannot be read"):
                await create(engine, "other", "broken")
            with pytest.raises(UnknownModelError, match="'four': no such model"):
                await create(engine, "other", "four")
        [after] = await engine.forward_backward([job("run", data)])
        assert after == before
        with pytest.raises(UnsupportedError, match="weights of broken are not whole"):
            engine.prepare()


async def test_an_unloaded_model_is_gone_from_memory(folders: dict[str, Path]) -> None:
    with engine_of(folders, holds=1) as engine, anyio.fail_after(30):
        for mode in ("training", "sampling"):
            if mode == "training":
                await trained(engine, "one", steps=1)
            else:
                await sampled(engine, "base:one")
            resident = engine._store.room.residents.get("one")
            assert resident is not None
            held = weakref.ref(resident.model)
            del resident
            await create(engine, mode, "two")
            assert held() is None


def test_what_does_not_fit_is_named_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    with engine_of(folders, holds=0.9) as engine:
        with pytest.raises(UnsupportedError, match=r"one takes .* may take .*MODEL_MEMORY_GB"):
            engine.prepare()
    at_start = {name: ModelSource(folders[name], load="start") for name in NAMES}
    with engine_of(at_start, holds=2) as engine:
        with pytest.raises(ConfigError, match=r"one, two, three are to be loaded at the start"):
            engine.prepare()
    with engine_of(folders, memory_gb=1e-5) as engine:
        with pytest.raises(UnsupportedError, match="the weights of one take"):
            engine.prepare()
        assert engine.counts["model_loads"] == 0
    long = {"one": ModelSource(folders["one"], context=257)}
    with pytest.raises(ConfigError, match="context of 257 tokens, it has 256"):
        TorchEngine(long).prepare()


def test_models_are_loaded_at_the_start_where_that_is_asked(folders: dict[str, Path]) -> None:
    given = {"one": ModelSource(folders["one"], load="start"), "two": folders["two"]}
    with engine_of(given, holds=1) as engine:
        models = {model.name: model for model in engine.prepare()}
        assert {name for name, model in models.items() if model.loaded} == {"one"}
        assert models["one"].size_bytes == engine.gauges["base_model_bytes"] > 0


async def test_a_model_can_have_a_shorter_context(folders: dict[str, Path]) -> None:
    with engine_of({"one": ModelSource(folders["one"], context=20)}) as engine:
        assert engine.get_model("one").context_length == 20
        await engine.publish("one", WeightsRef(base_model="one"))
        [answer] = (await sampled(engine, "one", max_tokens=50, stop_token_ids=())).sequences
        assert len(answer.tokens) <= 15


async def test_large_files_are_read_while_others_compute(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_room, "AHEAD_BYTES", 0)
    with engine_of(folders, holds=2) as engine, anyio.fail_after(30):
        await create(engine, "run", "one")
        assert not engine._store.room.reading._running  # nobody would have waited
        await create(engine, "other", "two")
        assert not engine._store.room.reading._running  # it is over
        [done] = await engine.forward_backward([job("other", [datum([5, 6, 7])])])
        assert not isinstance(done, Exception)


async def test_plans_reckon_with_the_other_models(folders: dict[str, Path]) -> None:
    memory = 0.02
    with engine_of({"one": folders["one"]}, memory_gb=memory) as engine:
        alone = engine.plan("one", "lora").budget
    with engine_of(folders, memory_gb=memory) as engine:
        among = engine.plan("one", "lora").budget
        room, facts = engine._store.room, engine.facts("one")
        assert alone is not None and among is not None
        others = sum(room.size(engine.facts(name)) for name in ("two", "three"))
        assert alone - among == others // 2
        cache = engine.budget.cache_bytes
        assert cache(facts) - cache(facts, beside=room.beside(facts)) == others // 2
        await create(engine, "run", "one")
        many = {f"run {number}": 10**5 for number in range(8)}
        room.adapters.update(many)
        fewer = engine.plan("one", "lora").budget
        assert fewer is not None and fewer < among


async def test_whole_models_are_refused_where_there_is_no_memory(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of({"one": folders["one"]}, memory_gb=1) as engine, anyio.fail_after(30):
        await create(engine, "whole", "one", "full_ft")
        ref = await engine.snapshot("whole")
        engine._store.room.residents.memory = engine._store.room.owned_bytes + 1000
        with pytest.raises(QuotaExceededError, match="of one beside models of full fine-tuning"):
            await engine.publish("weights", ref)
        with pytest.raises(QuotaExceededError, match="of one beside models of full fine-tuning"):
            await create(engine, "more", "one", "full_ft")
        await engine.delete_run("whole")
        await create(engine, "more", "one", "full_ft")


def test_a_store_counts_no_model_of_a_run_that_is_gone(folders: dict[str, Path]) -> None:
    with engine_of({"one": folders["one"]}) as engine:
        engine.trainer.create_run("x", "one", training_mode="full_ft", lora_config=None, seed=0)
        assert engine.gauges["own_model_bytes"] > 0
        engine.trainer.delete_run("x")
        gc.collect()
        assert engine.gauges["own_model_bytes"] == 0
