"""The line a minute of what a server does."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import Caller
from tests.fake_engine import FakeEngine
from weaver.protocol import OpenSampler, SamplerOpened
from weaver.server.service import LocalService
from weaver.server.totals import tell_totals

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
NAME = "weaver.server.totals"


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == NAME]


async def told_of(caplog: pytest.LogCaptureFixture, operations: int) -> None:
    for _ in range(400):
        if sum(record.fields["operations"] for record in told(caplog)) >= operations:
            return
        await anyio.sleep(0.05)


async def test_totals_are_told_where_something_was_done(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, NAME)
    async with LocalService(FakeEngine(), home=home) as service:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: tell_totals(service.parts.activity, every_s=0.1))
            await anyio.sleep(0.3)
            assert not told(caplog)  # nothing to tell
            caller = await Caller.open(service)
            await caller.do(OpenSampler(base_model="fake"), SamplerOpened)
            await caller.create()
            await told_of(caplog, 2)
            await anyio.sleep(0.25)
            tasks.cancel_scope.cancel()
    lines = [record.fields for record in told(caplog)]
    assert sum(one["operations"] for one in lines) == 2
    assert all(one["failed"] == 0 for one in lines) and lines[-1]["waiting"] == 0
    assert "tokens/s" in told(caplog)[0].getMessage()
