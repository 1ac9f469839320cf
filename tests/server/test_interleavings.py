"""Order, exactly once and cancellation under any delivery, on asyncio and trio.

Hypothesis draws what each run is asked for, how the submissions reach the service (reordered,
repeated, some only after having been lost), which are cancelled when, and which fail in the engine.
The outcome must be that of carrying out each run's operations one by one.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contracts.caller import BAD_GRADIENT, FORWARD, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from weaver.checks import check_loss
from weaver.engine.base import GradientJob
from weaver.errors import NonFiniteError
from weaver.protocol import ForwardBackward, OptimStep
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from tests.fake_engine.model import Floats
    from weaver.protocol import Operation, Submission

FAILING_GRADIENT = GRADIENT.model_copy(update={"datums": GRADIENT.datums * 2})
OPERATIONS: dict[str, Operation | None] = {
    "gradient": GRADIENT,
    "forward": FORWARD,
    "step": STEP,
    "refused": BAD_GRADIENT,
    "failing": FAILING_GRADIENT,
    "withdrawn": None,
    "lost": None,
}


@dataclass
class Case:
    """`scripts[r]` is what run r is asked for, in order; `deliveries` are indices into them all."""

    scripts: list[list[str]]
    deliveries: list[int]
    cancels: dict[int, int] = field(default_factory=dict)
    """After so many deliveries: which submission to cancel."""
    pauses: set[int] = field(default_factory=set)
    """After which deliveries the service gets time."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    script = st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, max_size=7)
    scripts = draw(st.lists(script, min_size=1, max_size=3))
    count = sum(len(script) for script in scripts)
    indices = st.integers(0, count - 1)
    repeats = draw(st.lists(indices, max_size=count))
    deliveries = draw(st.permutations([*range(count), *repeats]))
    moments = st.integers(0, len(deliveries))
    return Case(
        scripts,
        deliveries,
        draw(st.dictionaries(moments, indices, max_size=3)),
        draw(st.sets(moments, max_size=4)),
    )


class Trace:
    """What the engine was asked to do to each run."""

    def __init__(self) -> None:
        self.calls: dict[str, list[str]] = {}

    def __call__(self, name: str, argument: object) -> None:
        if isinstance(argument, GradientJob):
            failing = len(argument.datums) == 2
            kind = "failing" if failing else "gradient" if argument.backward else "forward"
            self.calls.setdefault(argument.run_id, []).append(kind)
            if failing:
                raise NonFiniteError("the loss is not finite.", hint="As the test asked for.")
        elif name == "optim_step":
            self.calls.setdefault(str(argument), []).append("step")


def expected(script: list[str], codes: list[str | None]) -> tuple[list[str | None], list[str]]:
    """The outcomes and calls of a run's operations, one by one; `codes` say which are cancelled."""
    wanted: list[str | None] = []
    calls: list[str] = []
    gradient, lacking = False, False
    for kind, seen in zip(script, codes, strict=True):
        cancelled = seen == "cancelled"
        if kind == "refused":
            wanted.append("token_out_of_range")
            lacking = True
        elif cancelled or kind in ("withdrawn", "lost"):
            wanted.append("cancelled")
            lacking |= kind in ("gradient", "failing", "lost")
        elif kind == "step" and lacking:
            wanted.append("gradients_discarded")
            gradient = lacking = False
        elif kind == "step":
            calls.append("step")
            wanted.append(None if gradient else "no_gradients")
            gradient = False
        else:
            calls.append(kind)
            wanted.append("non_finite" if kind == "failing" else None)
            gradient |= kind == "gradient"
            lacking |= kind == "failing"
    return wanted, calls


async def deliver(caller: Caller, case: Case, submissions: list[Submission]) -> None:
    for i, index in enumerate([*case.deliveries, None]):
        if i in case.cancels:
            await caller.service.cancel(caller.session_id, [submissions[case.cancels[i]].id])
        if i in case.pauses:
            await anyio.sleep(0.001)
        if index is not None:
            await caller.send(submissions[index])


async def check(case: Case, *, deterministic: bool) -> None:
    trace, engine = Trace(), FakeEngine()
    with tempfile.TemporaryDirectory() as home:
        async with LocalService(engine, home=Path(home), deterministic=deterministic) as service:
            caller = await Caller.open(service)
            runs = [await caller.create() for _ in case.scripts]
            engine.hook = trace
            by_run = [
                [
                    caller.stamp(OPERATIONS[kind], run, lost_gradient=kind == "lost")
                    for kind in script
                ]
                for run, script in zip(runs, case.scripts, strict=True)
            ]
            await deliver(caller, case, [s for submissions in by_run for s in submissions])
            outcomes = [
                [await caller.outcome(s.id) for s in submissions] for submissions in by_run
            ]  # of all runs, before the engine is looked into: it takes one call at a time
            for run, script, mine in zip(runs, case.scripts, outcomes, strict=True):
                codes = [o.error.code if o.error else None for o in mine]
                wanted, calls = expected(script, codes)
                assert codes == wanted
                assert trace.calls.get(run, []) == calls
                weights = engine.trainer.snapshot(run).tensors["weight"]
                assert np.array_equal(weights, alone(script, codes))
            assert not await service.collect(caller.session_id, after=caller.cursor, timeout_s=0)


def alone(script: list[str], codes: list[str | None]) -> Floats:
    """The weights after the same operations on an engine without a service."""
    trainer = FakeEngine().trainer
    trainer.create_run("run", "fake", training_mode="lora", lora_config=None, seed=0)
    for kind, code in zip(script, codes, strict=True):
        operation = OPERATIONS[kind]
        if isinstance(operation, ForwardBackward) and code is None and operation.backward:
            job = GradientJob(
                run_id="run",
                datums=operation.datums,
                loss_fn=operation.loss_fn,
                loss_fn_config=check_loss(operation.loss_fn, None),
            )
            trainer.forward_backward([job])
        if isinstance(operation, OptimStep) and code is None:
            trainer.optim_step("run", operation.params)
        if code == "gradients_discarded":
            trainer.clear_gradients("run")
    weights: Floats = trainer.snapshot("run").tensors["weight"]
    return weights


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_delivery_has_the_outcome_of_one_by_one(
    backend: str, deterministic: bool, case: Case
) -> None:
    async def main() -> None:
        await check(case, deterministic=deterministic)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    turns=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    resends=st.integers(1, 3),
)
def test_concurrent_sessions_of_one_run_each_keep_their_order(
    backend: str, turns: list[int], resends: int
) -> None:
    async def main() -> None:
        engine = FakeEngine()
        with tempfile.TemporaryDirectory() as home:
            async with LocalService(engine, home=Path(home)) as service:
                callers = [await Caller.open(service) for _ in range(3)]
                run = await callers[0].create()
                seen: list[float] = []

                def hook(name: str, argument: object) -> None:
                    if isinstance(argument, GradientJob):
                        seen.append(float(argument.loss_fn_config["denominator"]))

                engine.hook = hook
                sent: list[tuple[int, str]] = []

                async def send(who: int, submission: Submission) -> None:
                    for _ in range(resends):
                        await callers[who].send(submission)

                async with anyio.create_task_group() as tasks:
                    for i, who in enumerate(turns):
                        numbered = GRADIENT.model_copy(
                            update={"loss_fn_config": {"denominator": float(who * 100 + i + 1)}}
                        )
                        submission = callers[who].stamp(numbered, run)
                        sent.append((who, submission.id))
                        tasks.start_soon(send, who, submission)
                for who, submission_id in sent:
                    await callers[who].result(submission_id)
                for who in range(3):
                    mine = [n for n in seen if n // 100 == who]
                    assert mine == [who * 100 + i + 1 for i, w in enumerate(turns) if w == who]

    anyio.run(main, backend=backend)
