"""An operation that always ends its group fails by name after three attempts, and alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("ray")

from tests.contracts.caller import STEP
from tests.engine.cluster.test_failures import GROUP, NAME, Patient, gradient, kill, opened
from weaver.protocol import GradientsDone, StepDone
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.engine.cluster.group import Ranks

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(900)]
POISON = 3
"""Datums of the operation that no group survives."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_it_fails_after_three_attempts_and_others_go_on(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tmp_path / "engine", GROUP(ranks=2))
    group = engine._groups[NAME]
    call = group._call

    async def poisoned(ranks: Ranks, name: str, *arguments: Any) -> Any:
        if name == "forward_backward" and any(len(j.datums) == POISON for j in arguments[0]):
            kill(group, 1)
        return await call(ranks, name, *arguments)

    monkeypatch.setattr(group, "_call", poisoned)
    database = open_database(home, None)
    try:
        async with LocalService(engine, home=home, store=Journal(database)) as service:
            caller = await Patient.open(service)
            run, other = await caller.model(), await caller.model()
            first = await caller.do(gradient(0, 30, 8), GradientsDone, run_id=other)
            assert group.starts == 1
            outcome = await caller.outcome(await caller.start(gradient(1, *[9] * POISON), run))
            assert outcome.error is not None and outcome.error.code == "engine_lost"
            assert "in each of 3 attempts" in outcome.error.message and outcome.error.hint
            assert group.starts == 3  # the third attempt ended those
            again = await caller.do(gradient(0, 30, 8), GradientsDone, run_id=other)
            assert dict(again.output.metrics) == dict(first.output.metrics)
            await caller.do(STEP, StepDone, run_id=other)
            assert group.starts == 4
            assert await caller.refused(STEP, run_id=run) == "gradients_discarded"
            await caller.do(gradient(0, 9), GradientsDone, run_id=run)
    finally:
        engine.close()
        database.dispose()
