"""The session: order, batching, tombstones, cancellation, and failures by name."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from tests.client.helpers import ScriptedService
from weaver import wire
from weaver.client import handle as handle_module
from weaver.client.session import Answer, Session, open_session
from weaver.errors import (
    ClosedError,
    InvalidParamsError,
    OperationCancelledError,
    ServiceConnectionError,
    StorageError,
    TooLargeError,
    WaitTimeoutError,
)
from weaver.protocol import ForwardBackward, GradientsDone, OptimStep, Sample, Sampled, StepDone
from weaver.types import AdamParams, Datum, ModelInput

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from weaver.client.handle import OperationHandle
    from weaver.types import OptimStepResult

pytestmark = pytest.mark.anyio
STEP = Answer(StepDone, lambda result: result.output)


@asynccontextmanager
async def session_on(service: ScriptedService) -> AsyncIterator[Session]:
    with anyio.fail_after(5):
        async with open_session(service, Path()) as session:
            yield session


def step(session: Session, run_id: str | None = "run") -> OperationHandle[OptimStepResult]:
    return session.submit(OptimStep(params=AdamParams()), STEP, run_id=run_id)


async def test_places_are_counted_per_run_and_sent_in_one_request() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        handles = [step(session, run) for run in ("a", "b", "a", "a", "b")]
        results = [await handle for handle in handles]
    assert [(s.run_id, s.seq) for s in service.requests[0]] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("a", 3),
        ("b", 2),
    ]
    assert [r.metrics["step"] for r in results] == [1, 1, 2, 3, 2]
    assert len({s.id for s in service.submissions}) == 5


async def test_outcomes_may_come_in_any_order() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        first, second = step(session), step(session)
        await anyio.wait_all_tasks_blocked()
        assert (first.status, second.status) == ("running", "running")
        service.answer(service.submissions[1])
        assert (await second).metrics["step"] == 2
        assert not first.done()
        service.answer(service.submissions[0], StorageError("full"))
        with pytest.raises(StorageError, match="full"):
            await first
        assert (first.status, second.status) == ("failed", "done")


async def test_a_handle_is_awaited_by_many_and_again() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        handle = step(session)
        seen = []

        async def wait() -> None:
            seen.append(await handle)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            service.answer(service.submissions[0])
        assert seen == [await handle] * 3


async def test_a_cancelled_wait_leaves_the_operation_alone() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        handle = step(session)
        await anyio.wait_all_tasks_blocked()  # sent, however long that took
        with anyio.move_on_after(0.01):
            await handle
        assert handle.status == "running" and service.cancelled == []
        service.answer(service.submissions[0])
        assert (await handle).metrics["step"] == 1


async def test_cancel_before_sending_leaves_a_tombstone() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        handles = [step(session) for _ in range(3)]
        assert handles[1].status == "queued"
        assert handles[1].cancel()
        assert not handles[1].cancel()
        assert (await handles[2]).metrics["step"] == 3
        with pytest.raises(OperationCancelledError):
            await handles[1]
    assert [(s.seq, s.operation is None) for s in service.submissions] == [
        (1, False),
        (2, True),
        (3, False),
    ]
    assert not service.submissions[1].lost_gradient
    assert handles[1].status == "cancelled"


async def test_cancel_of_an_unsent_unordered_operation_sends_nothing() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        assert step(session, None).cancel()
        await step(session, None)
    assert len(service.submissions) == 1


async def test_cancel_after_sending_asks_the_service() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        handle = step(session)
        await anyio.wait_all_tasks_blocked()
        assert handle.cancel() and handle.status == "running"
        await anyio.wait_all_tasks_blocked()
        assert service.cancelled == [service.submissions[0].id]
        service.answer(service.submissions[0], OperationCancelledError("gone"))
        with pytest.raises(OperationCancelledError, match="gone"):
            await handle


async def test_what_is_behind_a_reserved_place_waits_for_it() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        ticket = session.reserve("later", STEP, run_id="run", adds_gradient=True)
        behind = step(session)
        await step(session, "other")
        assert behind.status == "queued"
        assert [(s.run_id, s.seq) for s in service.submissions] == [("other", 1)]
        session.fill(ticket, OptimStep(params=AdamParams()))
        assert (await ticket.handle).metrics["step"] == 1
        assert (await behind).metrics["step"] == 2
    assert [s.seq for s in service.requests[1]] == [1, 2]


async def test_a_reserved_place_can_be_given_up() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        ticket = session.reserve("later", STEP, run_id="run", adds_gradient=True)
        behind = step(session)
        assert ticket.handle.cancel()
        session.fill(ticket, OptimStep(params=AdamParams()))
        assert (await behind).metrics["step"] == 2
        with pytest.raises(OperationCancelledError):
            await ticket.handle
    assert [(s.operation is None, s.lost_gradient) for s in service.submissions] == [
        (True, True),
        (False, False),
    ]


async def test_a_withdrawn_gradient_pass_says_so() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        for backward in (True, False):
            operation = ForwardBackward(datums=(), loss_fn="cross_entropy", backward=backward)
            session.submit(operation, STEP, run_id="run").cancel()
        await step(session)
    assert [s.lost_gradient for s in service.submissions] == [True, False, False]


@pytest.mark.parametrize("part", ["submit", "collect"])
@pytest.mark.parametrize("error", [ServiceConnectionError("refused"), RuntimeError("a defect")])
async def test_a_service_that_dies_fails_every_handle(part: str, error: Exception) -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        first = step(session)
        await anyio.wait_all_tasks_blocked()
        if part == "submit":
            service.submit_error = error
            second = step(session)
        else:
            second = step(session)
            await anyio.wait_all_tasks_blocked()
            service.break_collect(error)
        for handle in (first, second):
            with pytest.raises(ServiceConnectionError, match=str(error)) as raised:
                await handle
            assert error in (raised.value, raised.value.__cause__)
        with pytest.raises(ServiceConnectionError):
            step(session)


async def test_closing_sends_what_is_queued_and_fails_what_is_pending() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        handle = step(session)
    assert len(service.submissions) == 1 and service.closed
    with pytest.raises(ClosedError):
        await handle
    with pytest.raises(ClosedError):
        step(session)


async def test_closing_within_the_block_does_not_cancel_the_block() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        handle = step(session)
        await session.close()
        await session.close()
        await anyio.lowlevel.checkpoint()
        with pytest.raises(ClosedError):
            await handle


async def test_a_wrong_kind_of_answer_is_an_error() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        operation = ForwardBackward(datums=(), loss_fn="cross_entropy")
        with pytest.raises(ServiceConnectionError, match="GradientsDone"):
            await session.submit(operation, STEP, run_id="run")


async def test_composed_handles_cancel_their_parts() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        parts = [step(session), step(session)]

        async def finish() -> list[OptimStepResult]:
            return [await part for part in parts]

        whole = session.compose("both", [*parts], finish)
        await anyio.wait_all_tasks_blocked()
        assert whole.status == "running"
        assert whole.cancel()
        assert service.cancelled == []
        await anyio.wait_all_tasks_blocked()
        assert service.cancelled == [s.id for s in service.submissions]
        service.answer(service.submissions[0], OperationCancelledError("gone"))
        service.answer(service.submissions[1], OperationCancelledError("gone"))
        with pytest.raises(OperationCancelledError):
            await whole
        assert whole.status == "cancelled" and all(part.done() for part in parts)


async def test_a_wait_ends_in_time_and_the_operation_goes_on() -> None:
    service = ScriptedService()
    async with session_on(service) as session:
        handle = step(session)
        for timeout in (0, 0.01):
            with pytest.raises(WaitTimeoutError, match=r"optim_step \(seq 1 of run\)"):
                await handle.result(timeout)
        for timeout in (-1, float("nan")):
            with pytest.raises(InvalidParamsError):
                await handle.result(timeout)
        service.answer(service.submissions[0])
        assert (await handle.result(1)).metrics["step"] == 1


async def test_a_long_wait_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handle_module, "LOG_WAIT_S", 0.01)
    service = ScriptedService()
    async with session_on(service) as session:
        handle, said = step(session), anyio.Event()

        def warning(message: str, *args: object) -> None:
            logging.getLogger("weaver").warning(message, *args)
            said.set()

        monkeypatch.setattr(handle_module, "logger", SimpleNamespace(warning=warning))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handle.result)
            await said.wait()
            service.answer(service.submissions[0])
    assert "waiting for optim_step (seq 1 of run)" in caplog.text


def sized(tokens: int) -> ForwardBackward:
    datum = Datum(model_input=[1] * tokens, loss_fn_inputs={"target_tokens": [1] * tokens})
    return ForwardBackward(datums=(datum,), loss_fn="cross_entropy")


async def test_what_is_too_large_fails_alone() -> None:
    service = ScriptedService(auto=True)
    service.most_tokens = 50
    async with session_on(service) as session:
        gradient = Answer(GradientsDone, lambda result: result.output)
        handles = [session.submit(sized(n), gradient, run_id="run") for n in (9, 20, 60, 30, 2)]
        sample = Sample(sampler_id="base:x", prompt=ModelInput.from_ints([1] * 60))
        alone = session.submit(sample, Answer(Sampled, lambda result: result.output))
        for handle in (handles[2], alone):
            with pytest.raises(TooLargeError, match="the limit is 50"):
                await handle
        for handle in (*handles[:2], *handles[3:], step(session)):
            await handle
    sent = [(s.seq, s.operation is None, s.lost_gradient) for s in service.submissions]
    assert sent == [(n, n == 3, n == 3) for n in range(1, 7)]


async def test_a_full_disk_fails_what_was_sent_and_no_more() -> None:
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        service.submit_error = StorageError("full")
        for _ in range(2):
            with pytest.raises(StorageError, match="full"):
                await step(session)
        service.submit_error = None
        assert (await step(session)).metrics["step"] == 3
    assert [(s.seq, s.operation is None) for s in service.requests[0]] == [
        (1, True),
        (2, True),
        (3, False),
    ]


async def test_requests_are_of_moderate_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PORTION_BYTES", 4000)
    monkeypatch.setattr(wire, "PORTION", 3)
    service = ScriptedService(auto=True)
    async with session_on(service) as session:
        gradient = Answer(GradientsDone, lambda result: result.output)
        tokens = (100, 100, 900, 100, 1, 1, 1)
        for handle in [session.submit(sized(n), gradient, run_id="run") for n in tokens]:
            await handle
    assert [len(request) for request in service.requests] == [2, 1, 3, 1]
