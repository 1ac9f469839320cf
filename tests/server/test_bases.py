"""Base models that do not fit together: others go on while one waits for room."""

from __future__ import annotations

import shutil
from contextlib import closing
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import GRADIENT, Caller
from tests.engine.test_bases import until
from weaver.engine.torch.catalog import NANO
from weaver.engine.torch.engine import TorchEngine
from weaver.protocol import CreateModel, GradientsDone, ModelCreated
from weaver.server.service import LocalService
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
LORA = LoraConfig(rank=2)


async def test_others_go_on_while_one_waits(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("one", "two")}
    for folder in models.values():
        shutil.copytree(NANO, folder)
    create = {name: CreateModel(base_model=name, lora_config=LORA) for name in models}
    engine = TorchEngine(models, threads=1, model_memory_gb=0.003)
    with closing(engine), anyio.fail_after(60):
        async with LocalService(engine, home=tmp_path / "home") as service:
            caller = await Caller.open(service)
            run = (await caller.do(create["one"], ModelCreated)).run.run_id
            engine._store.room.users.append(lambda: {"one"})  # as if samples of it ran
            waits = await caller.start(create["two"])
            await until(lambda: engine.gauges["waiting_for_models"])
            for _ in range(3):
                await caller.do(GRADIENT, GradientsDone, run_id=run)
            other = (await caller.do(create["one"], ModelCreated)).run.run_id
            await caller.do(GRADIENT, GradientsDone, run_id=other)
            assert engine.gauges["waiting_for_models"] == 1 and waits not in caller.outcomes
            engine._store.room.users.pop()
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            assert isinstance(await caller.result(waits), ModelCreated)
