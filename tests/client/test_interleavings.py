"""Any interleaving of verbs, cancellations and waits: order, exactly once, and no handle hangs.

The engine is the judge: it records what it was asked, in its own order.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.helpers import fake_client
from weaver import Datum
from weaver.errors import GradientsDiscardedError, NoGradientsError, OperationCancelledError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver import AsyncTrainingClient, OperationHandle

RUNS = 3
ACTIONS = st.one_of(
    st.tuples(st.just("pass"), st.integers(0, RUNS - 1)),
    st.tuples(st.just("step"), st.integers(0, RUNS - 1)),
    st.tuples(st.just("custom"), st.integers(0, RUNS - 1)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.integers(0, 30)),
    st.tuples(st.just("yield"), st.integers(0, 3)),
)


class Journal:
    """What the engine was asked: ("pass", run, mark) and ("step", run, learning rate)."""

    def __init__(self) -> None:
        self.passes: dict[str, list[int]] = {}
        self.steps: dict[str, list[int]] = {}
        self.order: dict[str, list[int]] = {}

    def hook(self, name: str, argument: Any) -> None:
        if name == "gradient" and argument.backward:
            mark = argument.datums[0].model_input.length
            self.passes.setdefault(argument.run_id, []).append(mark)
            self.order.setdefault(argument.run_id, []).append(mark)


def marked(mark: int) -> list[Datum]:
    """A batch that the engine's journal can tell from others: `mark` is its length."""
    return [Datum(model_input=[1] * mark, loss_fn_inputs={"target_tokens": [1] * mark})]


def total(datums: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
    return -logprobs[0].sum(), {}


async def play(actions: list[tuple[str, int]], home: Path) -> None:
    journal = Journal()
    async with fake_client(home, hook=journal.hook) as client:
        trainers = [await client.create_model("fake") for _ in range(RUNS)]
        calls: list[tuple[str, AsyncTrainingClient, int, OperationHandle[Any]]] = []
        for mark, (action, number) in enumerate(actions, start=1):
            if action == "yield":
                for _ in range(number):
                    await anyio.lowlevel.checkpoint()
            elif action in ("cancel", "wait") and calls:
                handle = calls[number % len(calls)][3]
                if action == "cancel":
                    handle.cancel()
                else:
                    with anyio.move_on_after(0.002):
                        await _outcome(handle)
            elif action in ("pass", "step", "custom"):
                trainer = trainers[number]
                verb: OperationHandle[Any]
                if action == "pass":
                    verb = trainer.forward_backward(marked(mark))
                elif action == "custom":
                    verb = trainer.forward_backward_custom(marked(mark), total)
                else:
                    verb = trainer.optim_step({"learning_rate": 0.01})
                calls.append((action, trainer, mark, verb))
        with anyio.fail_after(10):
            outcomes = [await _outcome(handle) for *_, handle in calls]
        for trainer in trainers:
            _check_run(trainer.model_id, calls, outcomes, journal)


def _check_run(model_id: str, calls: list[Any], outcomes: list[Any], journal: Journal) -> None:
    mine = [
        (action, mark, outcome)
        for (action, trainer, mark, _), outcome in zip(calls, outcomes, strict=True)
        if trainer.model_id == model_id
    ]
    done = [mark for action, mark, o in mine if action != "step" and not isinstance(o, Exception)]
    ran = journal.passes.get(model_id, [])
    assert ran == done, "each accepted pass ran exactly once, in the order of the calls"
    step, gradient, lost = 0, False, False
    for action, _, outcome in mine:
        if isinstance(outcome, OperationCancelledError):
            lost |= action != "step"
        elif action != "step":
            gradient = True
        elif lost:
            assert isinstance(outcome, GradientsDiscardedError)
            gradient, lost = False, False
        elif not gradient:
            assert isinstance(outcome, NoGradientsError)
        else:
            step += 1
            assert outcome.metrics["step"] == step
            gradient = False


async def _outcome(handle: OperationHandle[Any]) -> Any:
    try:
        return await handle
    except (OperationCancelledError, GradientsDiscardedError, NoGradientsError) as error:
        return error


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_any_interleaving_keeps_its_promises(backend: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(ACTIONS, max_size=30))
    def run(actions: list[tuple[str, int]]) -> None:
        with tempfile.TemporaryDirectory() as home:
            anyio.run(play, actions, Path(home), backend=backend)

    run()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_closing_at_any_moment_leaves_no_handle_behind(backend: str) -> None:
    async def play_and_close(count: int, ticks: int) -> None:
        with tempfile.TemporaryDirectory() as home:
            async with fake_client(Path(home)) as client:
                trainer = await client.create_model("fake")
                sampler = await client.create_sampling_client(base_model="fake")
                handles: list[OperationHandle[Any]] = []
                for i in range(count):
                    handles.append(trainer.forward_backward(marked(i + 1)))
                    handles.append(trainer.forward_backward_custom(marked(i + 1), total))
                    handles.append(sampler.sample(["a", "b"], {"max_tokens": 3}))
                    handles.append(trainer.save_weights_and_get_sampling_client())
                for _ in range(ticks):
                    await anyio.lowlevel.checkpoint()
        assert all(handle.done() for handle in handles)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(1, 5), st.integers(0, 60))
    def run(count: int, ticks: int) -> None:
        anyio.run(play_and_close, count, ticks, backend=backend)

    run()
