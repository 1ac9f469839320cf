"""The contract of `Store`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import FORWARD, STEP
from weaver.protocol import ErrorInfo, StepDone, Submission
from weaver.types import LoraConfig, MetricPoint, OptimStepResult, TrainingRun

if TYPE_CHECKING:
    from weaver.server.store import Store

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DONE = StepDone(output=OptimStepResult(metrics={"step": 1.0}))


def run(run_id: str, step: int = 0) -> TrainingRun:
    return TrainingRun(
        run_id=run_id,
        base_model="fake",
        training_mode="lora",
        lora_config=LoraConfig(),
        step=step,
        status="idle",
        created_at=NOW,
        last_request_at=NOW,
    )


async def test_what_was_appended_is_pending_until_it_is_settled(store: Store) -> None:
    first = Submission(id="1", operation=FORWARD, run_id="r", seq=1)
    second = Submission(id="2", operation=STEP, run_id="r", seq=2)
    await store.append("a", [first, second])
    await store.append("b", [first])
    assert list(await store.pending()) == [("a", first), ("a", second), ("b", first)]
    await store.settle("a", "1", DONE)
    await store.settle("b", "1", ErrorInfo(code="cancelled", message="no"))
    assert list(await store.pending()) == [("a", second)]


async def test_a_run_is_replaced_by_its_newer_description(store: Store) -> None:
    await store.put_run(run("r"))
    await store.put_run(run("s"))
    await store.put_run(run("r", step=3))
    assert [(r.run_id, r.step) for r in await store.runs()] == [("r", 3), ("s", 0)]


async def test_metrics_keep_their_order_and_belong_to_a_run(store: Store) -> None:
    points = [MetricPoint(name=n, value=v, occurred_at=NOW) for n, v in [("a", 1), ("b", 2)]]
    await store.add_metrics("r", points)
    await store.add_metrics("r", points[:1])
    assert [p.value for p in await store.metrics("r")] == [1, 2, 1]
    assert [p.value for p in await store.metrics("r", name="a")] == [1, 1]
    assert list(await store.metrics("s")) == []
