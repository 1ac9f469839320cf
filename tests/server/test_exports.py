"""How long merged models are kept, and what exports say of themselves."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_durability import until
from weaver.engine.torch.catalog import NANO
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import NotFoundError
from weaver.protocol import CreateModel, GradientsDone, ModelCreated, StepDone
from weaver.server import exports
from weaver.server.checkpoints import now_utc
from weaver.server.http.telemetry import ServerMetrics
from weaver.server.service import LocalService
from weaver.types import MetricPoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def merged(home: Path) -> set[str]:
    return {manifest.parent.name for manifest in home.glob("merged/*/*/*/manifest.json")}


async def test_a_merged_model_goes_with_its_checkpoint_or_its_day(home: Path) -> None:
    clock = [now_utc()]
    async with LocalService(FakeEngine(), home=home, now=lambda: clock[0]) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        first, second = [await caller.save(run, name=name) for name in ("a", "b")]
        for path in (first, second):
            await service.export_checkpoint(path, merge=True)
        assert merged(home) == {"a", "b"}
        await service.delete_checkpoint(first)
        service.parts.exports.sweep()
        assert merged(home) == {"b"}
        clock[0] += timedelta(days=1, seconds=1)
        service.parts.exports.sweep()
        assert merged(home) == set()
        await service.export_checkpoint(second, merge=True)  # and comes back when it is asked for
        assert merged(home) == {"b"}


async def test_a_start_removes_what_killed_saves_and_merges_left(home: Path) -> None:
    drafts = [home / folder / "run-1/weights/.draft-1" for folder in ("runs", "live", "merged")]
    for draft in drafts:
        draft.mkdir(parents=True)

    async def all_gone() -> bool:
        return not any(draft.exists() for draft in drafts)

    async with LocalService(FakeEngine(), home=home):
        with anyio.fail_after(5):
            await until(all_gone)


async def test_only_the_newest_few_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "MERGED_KEPT", 2)
    async with LocalService(FakeEngine(), home=home) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        paths = [await caller.save(run, name=name) for name in "abc"]
        for path in paths:
            await service.export_checkpoint(path, merge=True)
        assert merged(home) == {"b", "c"}
        await service.export_checkpoint(paths[2], merge=True)
        assert merged(home) == {"b", "c"}


@pytest.mark.parametrize("allow_paths", [True, False])
async def test_an_adapter_names_the_source_of_its_base(home: Path, allow_paths: bool) -> None:
    engine = TorchEngine({"alias": NANO}, allow_paths=allow_paths, threads=1)
    async with LocalService(engine, home=home) as service:
        caller = await Caller.open(service)
        path = await caller.save(await caller.create("alias"))
        data = await service.read_exported(path, "adapter_config.json")
        assert json.loads(data)["base_model_name_or_path"] == str(NANO)
    engine.close()


def front_of(card: str) -> dict[str, object]:
    """What the hub reads of it: YAML, of which JSON is a part."""
    _, front, _ = card.split("---\n", 2)
    return {key: json.loads(value) for key, _, value in map(colon, front.splitlines())}


def colon(line: str) -> tuple[str, str, str]:
    return line.partition(": ")


async def test_a_merged_model_has_a_card_with_the_data_of_its_run(home: Path) -> None:
    async with LocalService(FakeEngine(models=["org/fake"]), home=home) as service:
        caller = await Caller.open(service)
        create = CreateModel(base_model="org/fake", user_metadata={"task": "a ``` | --- b"})
        run = (await caller.do(create, ModelCreated)).run.run_id
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)
        path = await caller.save(run, name="one")
        points = [("reward", 0.25, 0), ("reward", 0.5, 1), ("other", 2.0, None), ("reward", 9.0, 2)]
        await service.log_metrics(
            run, [MetricPoint(name=name, value=value, step=step) for name, value, step in points]
        )
        await service.export_checkpoint(path, merge=True)
        card = (await service.read_exported(path, "README.md", merge=True)).decode()
        front = front_of(card)
        assert front["base_model"] == "org/fake" and front["pipeline_tag"] == "text-generation"
        told = json.loads(card.split("```json\n")[1].split("\n```")[0])
        assert told["run_id"] == run and told["step"] == 1
        assert told["lora_config"]["rank"] == 32
        assert told["user_metadata"] == {"task": "a ``` | --- b"}
        assert told["metrics"] == {"reward": 0.5, "other": 2.0}  # as they were at that step


async def test_what_full_fine_tuning_saves_has_a_card_and_no_hub_id_of_a_name(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        caller = await Caller.open(service)
        create = CreateModel(base_model="fake", training_mode="full_ft")
        run = (await caller.do(create, ModelCreated)).run.run_id
        card = (await service.read_exported(await caller.save(run), "README.md")).decode()
        assert "base_model" not in front_of(card) and "full fine-tuning" in card
        adapter = await caller.save(await caller.create())
        with pytest.raises(NotFoundError):
            await service.read_exported(adapter, "README.md")


async def test_the_sweeper_tells_what_it_frees(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "weaver")
    clock = [now_utc()]
    async with LocalService(
        FakeEngine(), home=home, now=lambda: clock[0], sweep_every_s=0.01
    ) as service:
        caller = await Caller.open(service)
        path = await caller.save(await caller.create())
        size = (await service.set_checkpoint_ttl(path, 60)).size_bytes
        activity = service.parts.activity
        assert size > 1000 and activity.freed_bytes == 0
        clock[0] += timedelta(seconds=61)

        async def swept() -> bool:
            return activity.freed_bytes == size

        with anyio.fail_after(5):
            await until(swept)
        shown = ServerMetrics(activity, service.parts.engine).render().decode()
        assert f"weaver_swept_bytes_total {float(size)}" in shown
    assert caplog.text.count(f"{size} bytes freed") == 1
