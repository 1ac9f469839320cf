"""The contract of a `Journal` that outlives its process."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa

from tests.contracts.caller import FORWARD, GRADIENT, STEP
from weaver.errors import ConflictError, StorageError
from weaver.protocol import ErrorInfo, Outcome, StepDone, Submission
from weaver.server import journal
from weaver.server.keys import OWNER
from weaver.server.records import Answer, SessionRecord, Settled
from weaver.types import LoraConfig, MetricPoint, ModelInfo, OptimStepResult, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import Operation
    from weaver.server.journal import Journal

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DONE = StepDone(output=OptimStepResult(metrics={"step": 1.0}))
NO = ErrorInfo(code="cancelled", message="no")
MODEL = ModelInfo(name="fake", architecture="x", vocab_size=9, context_length=9, num_parameters=9)


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


def sent(submission_id: str, operation: Operation | None = STEP, *, seq: int = 1) -> Submission:
    return Submission(id=submission_id, operation=operation, run_id="r", seq=seq)


def ended(
    submission_id: str, cursor: int, *, number: int | None = None, error: ErrorInfo | None = None
) -> Settled:
    result = DONE if error is None else None
    outcome = Outcome(submission_id=submission_id, cursor=cursor, result=result, error=error)
    return Settled(
        session_id="a", outcome=outcome, size_bytes=100, number=number, lost_gradient=number is None
    )


async def test_metrics_keep_their_order_and_belong_to_a_run(store: Journal) -> None:
    points = [MetricPoint(name=n, value=v, occurred_at=NOW) for n, v in [("a", 1), ("b", 2)]]
    await store.add_metrics("r", points)
    await store.add_metrics("r", [*points[:1], MetricPoint(name="c", value=0.1, step=7)])
    assert list(await store.metrics("r"))[:3] == [*points, points[0]]
    assert [p.value for p in await store.metrics("r", name="a")] == [1, 1]
    [odd] = await store.metrics("r", name="c")
    assert odd.value == 0.1 and odd.step == 7 and odd.occurred_at is None
    assert list(await store.metrics("s")) == []


async def test_what_was_appended_is_pending_until_it_is_settled(store: Journal) -> None:
    await store.open_session(SessionRecord("a", OWNER))
    await store.append("a", [sent("1", FORWARD), sent("2", seq=2)])
    await store.append("b", [sent("1", FORWARD)])
    pending = [(e.session_id, e.submission, e.cursor) for e in await store.entries()]
    assert pending == [
        ("a", sent("1", FORWARD), 0),
        ("a", sent("2", seq=2), 0),
        ("b", sent("1", FORWARD), 0),
    ]
    await store.settle([ended("1", 1, number=1), ended("2", 2, error=NO)])
    first, second, third = await store.entries()
    assert (first.submission, first.cursor, first.executed) == (None, 1, True)
    assert isinstance(first.outcome, Outcome) and first.outcome.result == DONE
    assert (second.executed, second.lost_gradient) == (False, True)
    assert isinstance(second.outcome, Outcome) and second.outcome.error == NO
    assert third.submission == sent("1", FORWARD)
    assert len({first.fingerprint, third.fingerprint}) == 1 != len(first.fingerprint)


async def test_answers_are_written_with_outcomes_and_go_with_their_run(store: Journal) -> None:
    await store.open_session(SessionRecord("a", OWNER))
    await store.put_run(run("r"), model=MODEL, seed=0)
    await store.append("a", [sent("1"), sent("2", seq=2)])
    answers = [
        Answer(run_id="r", kind="optim_step", step=step, metrics={"grad_norm": 0.1 * step})
        for step in (1, 2)
    ]
    for number, answer in enumerate(answers, start=1):
        await store.settle([replace(ended(str(number), number, number=number), answer=answer)])
    assert list(await store.answers("r")) == answers
    assert list(await store.answers("s")) == []
    await store.rewind_metrics("r", logged=0, computed=1)
    assert list(await store.answers("r")) == answers[:1]
    await store.delete_run("r")
    assert list(await store.answers("r")) == []


async def test_an_acknowledged_outcome_goes_its_submission_is_remembered(
    store: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ACKNOWLEDGED", 1)
    await store.open_session(SessionRecord("a", OWNER))
    await store.append("a", [sent("1"), sent("2", seq=2)])
    await store.settle([ended("1", 1, number=1)])
    store.acknowledge("a", ["1"])
    await store.settle([ended("2", 2, number=2)])
    first, second = await store.entries()
    assert first.outcome is None and first.cursor == 1 and first.seq == 1
    assert second.outcome is not None


async def test_a_run_can_be_replayed_from_its_snapshot_on(store: Journal) -> None:
    await store.open_session(SessionRecord("a", OWNER))
    await store.put_run(run("r"), model=MODEL, seed=5)
    await store.put_run(run("s"), model=MODEL, seed=6)
    operations = [GRADIENT, STEP, GRADIENT, STEP]
    await store.append("a", [sent(str(i), op, seq=i) for i, op in enumerate(operations, start=1)])
    for number in (1, 2, 3):
        error = NO if number == 3 else None
        settled = ended(str(number), number, number=number, error=error)
        await store.settle([settled], runs=[run("r", step=number)])
    record = await store.run("r")
    assert record is not None and (record.seed, record.snapshot, record.executed) == (5, 0, 3)
    assert (record.model, record.run.step) == (MODEL, 3)
    assert [r.run.run_id for r in await store.runs()] == ["r", "s"]
    done = await store.executed("r", after=0)
    assert [(one.number, one.operation, one.error) for one in done] == [
        (1, GRADIENT, None),
        (2, STEP, None),
        (3, GRADIENT, "cancelled"),
    ]
    await store.put_snapshot("r", 2)
    record = await store.run("r")
    assert record is not None and (record.snapshot, record.executed) == (2, 3)
    assert [one.number for one in await store.executed("r", after=2)] == [3]
    assert len(await store.entries()) == 4  # a resend is still recognised
    assert await store.run("t") is None


async def test_a_closed_session_leaves_what_its_runs_need(store: Journal) -> None:
    await store.open_session(SessionRecord("a", OWNER))
    await store.put_run(run("r"), model=MODEL, seed=0)
    await store.append("a", [sent("1", GRADIENT), sent("2", seq=2), sent("3", seq=3)])
    await store.settle([ended("1", 1, number=1), ended("3", 2, error=NO)])
    await store.close_session("a")
    assert [record.closed for record in await store.sessions()] == [True]
    assert [entry.submission_id for entry in await store.entries()] == ["2"]
    assert [one.number for one in await store.executed("r", after=0)] == [1]
    await store.settle([ended("2", 3, number=2)])
    await store.put_snapshot("r", 2)
    assert not await store.executed("r", after=0) and not await store.entries()


async def test_damage_is_found_where_it_is(store: Journal, database: sa.Engine) -> None:
    await store.open_session(SessionRecord("a", OWNER))
    for run_id in ("r", "s"):
        await store.put_run(run(run_id), model=MODEL, seed=0)
    await store.append("a", [sent("1", GRADIENT), sent("2", seq=2)])
    await store.settle([ended("1", 1, number=1)])
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE operations SET body = substr(body, 1, 30)"))
        connection.execute(sa.text("UPDATE runs SET description = model WHERE run_id = 's'"))
    with pytest.raises(StorageError, match="operation 1 of r"):
        await store.executed("r", after=0)
    first, second = await store.entries()
    assert isinstance(first.outcome, Outcome)
    assert isinstance(second.submission, StorageError)
    assert [record.run.run_id for record in await store.runs()] == ["r"]


async def test_one_bad_write_does_not_fail_those_beside_it(store: Journal) -> None:
    failed = []
    await store.open_session(SessionRecord("a", OWNER))

    async def append(submission_id: str) -> None:
        seq = 2**70 if submission_id == "4" else 1
        try:
            await store.append("a", [sent(submission_id).model_copy(update={"seq": seq})])
        except (ConflictError, StorageError):  # used before; too large for a column
            failed.append(submission_id)

    await store.append("a", [sent("0")])
    async with anyio.create_task_group() as tasks:
        for submission_id in ("1", "2", "0", "3", "4", "5"):
            tasks.start_soon(append, submission_id)
    assert sorted(failed) == ["0", "4"]
    assert {entry.submission_id for entry in await store.entries()} == set("01235")


async def test_two_processes_on_one_database_share_out_a_name(
    store: Journal, database: sa.Engine
) -> None:
    """Each looks which names are free before either has written."""
    other, barrier = journal.Journal(database), anyio.Event()
    looked: list[Journal] = []

    async def put(one: Journal, run_id: str) -> None:
        read = one.writer.read

        async def read_and_wait(query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
            rows = await read(query)
            looked.append(one)
            if len(looked) == 2:
                barrier.set()
            await barrier.wait()
            return rows

        one.writer.read = read_and_wait  # type: ignore[method-assign]
        named = run(run_id).model_copy(update={"name": "words"})
        given.append(await one.put_run(named, model=MODEL, seed=0))

    given: list[str | None] = []
    async with anyio.create_task_group() as group:
        group.start_soon(put, store, "r")
        group.start_soon(put, other, "s")
    assert sorted(map(str, given)) == ["words", "words-2"] and len(looked) == 3
    assert {record.run.name for record in await store.runs()} == set(given)
    mine = await store.put_run(
        run("t").model_copy(update={"project": "b", "name": "words"}), model=MODEL, seed=0
    )
    assert mine == "words"  # of another project


async def test_connections_that_the_database_has_ended_are_made_anew(
    store: Journal, database: sa.Engine
) -> None:
    if database.dialect.name == "sqlite":
        pytest.skip("SQLite has none")
    await store.open_session(SessionRecord("a", OWNER))
    another = sa.create_engine(database.url)
    with another.connect() as other:
        others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
        )
        other.execute(sa.text(f"{others} AND datname = current_database()"))
    another.dispose()
    await store.open_session(SessionRecord("b", OWNER))
    assert [record.session_id for record in await store.sessions()] == ["a", "b"]
