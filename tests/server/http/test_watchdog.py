"""A loop that stands still is reported once, with the place; one that moves is not."""

from __future__ import annotations

import logging
import time

import anyio
import pytest

from weaver.server.http import telemetry
from weaver.server.http.telemetry import watch

pytestmark = pytest.mark.anyio


def hold_up() -> None:
    time.sleep(0.5)


async def test_the_place_where_a_loop_stands_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "BEAT_S", 0.02)
    monkeypatch.setattr(telemetry, "STILL_S", 0.2)
    with caplog.at_level(logging.WARNING):
        async with watch():
            await anyio.sleep(0.1)
            hold_up()
            await anyio.sleep(0.1)
            hold_up()
    [record] = [r for r in caplog.records if r.name == telemetry.__name__]
    assert "hold_up" in record.getMessage()
    assert "time.sleep" in record.getMessage()


async def test_a_loop_that_waits_is_not_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "BEAT_S", 0.02)
    with caplog.at_level(logging.WARNING):
        async with watch():
            await anyio.sleep(0.3)
    assert not [r for r in caplog.records if r.name == telemetry.__name__]
