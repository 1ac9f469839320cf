"""The contract of `Service`: order, exactly once, cancellation, and what a lost batch does."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import BAD_GRADIENT, FORWARD, GRADIENT, STEP, Caller
from weaver.engine.base import GradientJob
from weaver.errors import ConflictError, NonFiniteError, NotFoundError
from weaver.protocol import GradientsDone, OptimStep, StepDone, Submission
from weaver.types import AdamParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fake_engine import FakeEngine
    from weaver.protocol import Service

pytestmark = pytest.mark.anyio


class Gate:
    """Holds the engine inside the first call of `name` until it is opened."""

    def __init__(self, engine: FakeEngine, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.name = name
        engine.hook = self.hook

    def hook(self, name: str, argument: object) -> None:
        if name == self.name and not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(20)

    async def until_reached(self) -> None:
        assert await anyio.to_thread.run_sync(self.reached.wait, 20)


@pytest.fixture
def gate(engine: FakeEngine) -> Iterator[Gate]:
    gate = Gate(engine, "forward_backward")
    yield gate
    gate.opened.set()


async def test_training_lowers_the_loss(caller: Caller) -> None:
    run = await caller.create()
    losses = []
    for step in range(1, 6):
        gradient, taken = await caller.send(caller.stamp(GRADIENT, run), caller.stamp(STEP, run))
        done = await caller.result(gradient)
        assert isinstance(done, GradientsDone)
        losses.append(done.output.metrics["loss"])
        stepped = await caller.result(taken)
        assert isinstance(stepped, StepDone) and stepped.output.metrics["step"] == step
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


async def test_operations_run_by_seq_whatever_their_arrival(
    caller: Caller, engine: FakeEngine
) -> None:
    run = await caller.create()
    called: list[str] = []
    engine.hook = lambda name, argument: called.append(name)
    submissions = [caller.stamp(op, run) for op in (GRADIENT, STEP, GRADIENT, STEP)]
    for i in (3, 1, 2, 0):
        await caller.send(submissions[i])
    for submission in submissions:
        await caller.result(submission.id)
    wanted = [name for name in called if name in ("forward_backward", "optim_step")]
    assert wanted == ["forward_backward", "optim_step"] * 2


async def test_a_resend_gets_the_first_answer(caller: Caller, service: Service) -> None:
    run = await caller.create()
    pair = [caller.stamp(GRADIENT, run), caller.stamp(STEP, run)]
    for _ in range(3):
        await caller.send(*pair, *pair)
    await caller.result(pair[1].id)
    await caller.send(*pair)
    assert (await service.get_run(run)).step == 1
    assert not await service.collect(caller.session_id, after=caller.cursor, timeout_s=0.05)


async def test_outcomes_come_again_until_they_are_acknowledged(
    caller: Caller, service: Service
) -> None:
    run = await caller.create()
    await caller.result(await caller.start(FORWARD, run))
    last = caller.cursor
    again = await service.collect(caller.session_id, after=last - 1, timeout_s=1)
    once_more = await service.collect(caller.session_id, after=last - 1, timeout_s=1)
    assert [o.cursor for o in again] == [o.cursor for o in once_more] == [last]
    assert not await service.collect(caller.session_id, after=last, timeout_s=0)


@pytest.mark.parametrize("what", ["id", "place", "place in one request"])
async def test_another_body_is_a_conflict_and_nothing_is_accepted(
    caller: Caller, service: Service, what: str
) -> None:
    run = await caller.create()
    first = caller.stamp(GRADIENT, run)
    other = OptimStep(params=AdamParams(learning_rate=0.5))
    new = caller.stamp(STEP, run)
    if what != "place in one request":
        await caller.send(first)
    clash = Submission(
        id=first.id if what == "id" else "another", operation=other, run_id=run, seq=first.seq
    )
    batch = [new, clash] if what != "place in one request" else [first, clash]
    with pytest.raises(ConflictError) as caught:
        await caller.send(*batch)
    assert clash.id in str(caught.value) and "optim_step" in str(caught.value)
    await caller.send(first, new)
    await caller.result(new.id)
    assert (await service.get_run(run)).step == 1


async def test_a_refused_operation_takes_its_place_at_once(caller: Caller, gate: Gate) -> None:
    run = await caller.create()
    slow = await caller.start(GRADIENT, run)
    await gate.until_reached()
    bad = await caller.outcome(await caller.start(BAD_GRADIENT, run))
    assert bad.error is not None and bad.error.code == "token_out_of_range"
    assert bad.error.field == "datums[0].model_input" and bad.error.hint
    gate.opened.set()
    await caller.result(slow)
    await caller.do(FORWARD, GradientsDone, run_id=run)


@pytest.mark.parametrize("how", ["refused", "failed", "defect", "cancelled", "withdrawn"])
async def test_a_batch_that_lacks_a_part_is_never_applied(
    caller: Caller, service: Service, engine: FakeEngine, how: str
) -> None:
    run = await caller.create()
    await caller.do(GRADIENT, GradientsDone, run_id=run)
    code = await {
        "refused": _refused_gradient,
        "failed": _failed_gradient,
        "defect": _defective_gradient,
        "cancelled": _cancelled_gradient,
        "withdrawn": _withdrawn_gradient,
    }[how](caller, engine, run)
    assert code in ("token_out_of_range", "non_finite", "engine_error", "cancelled")
    await caller.do(GRADIENT, GradientsDone, run_id=run)
    assert await caller.refused(STEP, run_id=run) == "gradients_discarded"
    assert await caller.refused(STEP, run_id=run) == "no_gradients"
    await caller.do(GRADIENT, GradientsDone, run_id=run)
    await caller.do(STEP, StepDone, run_id=run)
    assert (await service.get_run(run)).step == 1


async def _refused_gradient(caller: Caller, engine: FakeEngine, run: str) -> str:
    return await caller.refused(BAD_GRADIENT, run_id=run)


async def _failed_gradient(caller: Caller, engine: FakeEngine, run: str) -> str:
    def hook(name: str, argument: object) -> None:
        if name == "gradient":
            assert isinstance(argument, GradientJob) and argument.run_id == run
            raise NonFiniteError("the loss is not finite.", hint="Lower the learning rate.")

    engine.hook = hook
    code = await caller.refused(GRADIENT, run_id=run)
    engine.hook = lambda name, argument: None
    return code


async def _defective_gradient(caller: Caller, engine: FakeEngine, run: str) -> str:
    def hook(name: str, argument: object) -> None:
        raise ZeroDivisionError(name)

    engine.hook = hook
    code = await caller.refused(GRADIENT, run_id=run)
    engine.hook = lambda name, argument: None
    return code


async def _cancelled_gradient(caller: Caller, engine: FakeEngine, run: str) -> str:
    gate = Gate(engine, "forward_backward")
    running, waiting = await caller.send(caller.stamp(GRADIENT, run), caller.stamp(GRADIENT, run))
    await gate.until_reached()
    await caller.service.cancel(caller.session_id, [running, waiting, "unknown"])
    outcome = await caller.outcome(waiting)
    gate.opened.set()
    assert isinstance(await caller.result(running), GradientsDone)  # it had begun
    assert outcome.error is not None
    return outcome.error.code


async def _withdrawn_gradient(caller: Caller, engine: FakeEngine, run: str) -> str:
    (tombstone,) = await caller.send(caller.stamp(None, run, lost_gradient=True))
    outcome = await caller.outcome(tombstone)
    assert outcome.error is not None
    return outcome.error.code


async def test_what_keeps_no_gradient_discards_none(caller: Caller, gate: Gate) -> None:
    gate.opened.set()
    run = await caller.create()
    await caller.do(GRADIENT, GradientsDone, run_id=run)
    bad = BAD_GRADIENT.model_copy(update={"backward": False})
    assert await caller.refused(bad, run_id=run) == "token_out_of_range"
    withdrawn = await caller.outcome(await caller.start(None, run))
    assert withdrawn.error is not None and withdrawn.error.code == "cancelled"
    await caller.do(STEP, StepDone, run_id=run)


async def test_two_sessions_count_for_themselves(caller: Caller, service: Service) -> None:
    run = await caller.create()
    other = await Caller.open(service)
    for who in (caller, other, caller):
        await who.do(GRADIENT, GradientsDone, run_id=run)
        await who.do(STEP, StepDone, run_id=run)
    assert (await service.get_run(run)).step == 3


async def test_a_run_goes_on_after_its_session(caller: Caller, service: Service) -> None:
    run = await caller.create()
    await caller.do(GRADIENT, GradientsDone, run_id=run)
    caller.stamp(GRADIENT, run)  # never sent, so that the next one waits in vain
    await caller.start(STEP, run)
    await service.close_session(caller.session_id)
    await service.close_session(caller.session_id)
    with pytest.raises(NotFoundError):
        await caller.start(STEP, run)
    other = await Caller.open(service)
    assert await other.refused(STEP, run_id=run) == "gradients_discarded"
    assert (await service.get_run(run)).status == "idle"


async def test_collect_waits_for_an_outcome_and_no_longer(caller: Caller, gate: Gate) -> None:
    run = await caller.create()
    submission = await caller.start(GRADIENT, run)
    await gate.until_reached()
    with anyio.fail_after(2):
        assert not await caller.service.collect(
            caller.session_id, after=caller.cursor, timeout_s=0.05
        )
    gate.opened.set()
    await caller.result(submission)
