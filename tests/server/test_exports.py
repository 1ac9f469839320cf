"""How long merged models are kept, and what one may learn of a server's disk from an export."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import Caller
from tests.fake_engine import FakeEngine
from tests.server.test_durability import until
from weaver.engine.torch.engine import TorchEngine
from weaver.server import exports
from weaver.server.checkpoints import now_utc
from weaver.server.service import LocalService

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
async def test_an_adapter_does_not_tell_where_a_server_keeps_its_models(
    home: Path, allow_paths: bool
) -> None:
    engine = TorchEngine(allow_paths=allow_paths, threads=1)
    async with LocalService(engine, home=home) as service:
        caller = await Caller.open(service)
        path = await caller.save(await caller.create("weaver-nano"))
        data = await service.read_exported(path, "adapter_config.json")
        named = json.loads(data)["base_model_name_or_path"]
        assert (named == "weaver-nano") is not allow_paths
    engine.close()
