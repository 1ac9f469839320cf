"""The sync clients: the same verbs with `wait`, threads that end, and exits that never hang."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_overloads

import pytest

import weaver
from tests.client.helpers import DATUMS, STEP
from tests.fake_engine import FakeEngine
from weaver import Handle, RewardClient, SamplingClient, ServiceClient, TrainingClient
from weaver.errors import (
    ClosedError,
    MissingDependencyError,
    OperationCancelledError,
    UnknownModelError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def embedded_fake(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[None]:
    """Lets `ServiceClient()` embed the fake engine."""
    from weaver.client import opening

    monkeypatch.setattr(opening, "_torch_engine", lambda settings: FakeEngine(**options))
    yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python ignores SIGINT when it was started in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceClient]:
    with embedded_fake(monkeypatch), ServiceClient(home=tmp_path) as client:
        yield client


@pytest.fixture
def no_thread_left() -> Iterator[Callable[[], None]]:
    """Waits until no thread is left that was not there before the test, and says if one is."""
    before = set(threading.enumerate())

    def wait() -> None:
        deadline = time.monotonic() + 2
        while set(threading.enumerate()) - before and time.monotonic() < deadline:
            time.sleep(0.005)
        assert set(threading.enumerate()) <= before

    yield wait
    wait()


def test_a_training_loop_as_documented(client: ServiceClient) -> None:
    trainer = client.create_model(base_model="fake", lora_config={"rank": 8})
    losses = []
    for _ in range(10):
        result = trainer.forward_backward(DATUMS, "cross_entropy", wait=True)
        trainer.optim_step(weaver.AdamParams(**STEP), wait=True)
        losses.append(result.get("result", {}).get("metrics", {}).get("loss", 0.0))
    assert losses[-1] < 0.5 * losses[0]
    sampler = trainer.save_weights_and_get_sampling_client(name="my-model")
    result = sampler.sample(prompt="H", sampling_params={"max_tokens": 3}, num_samples=2)
    assert len(result["sequences"]) == 2
    assert sampler.compute_logprobs(prompt="Hel")[0] is None
    assert isinstance(sampler, SamplingClient) and sampler.weights_version == 10


def test_handles_are_queued_in_the_order_of_the_calls(client: ServiceClient) -> None:
    trainer = client.create_model("fake")
    handles = []
    for _ in range(20):
        trainer.forward_backward(DATUMS)
        handles.append(trainer.optim_step(STEP))
    assert [handle.result(5).metrics["step"] for handle in handles] == list(range(1, 21))
    assert isinstance(handles[0], Handle) and handles[0].done()
    assert handles[0].status == "done" and not handles[0].cancel()
    assert "optim_step" in repr(handles[0])


def test_every_verb(client: ServiceClient, tmp_path: Path) -> None:
    trainer = client.create_training_client("fake")
    trainer.forward_backward(DATUMS)
    trainer.optim_step(STEP)
    state = trainer.save_state("a")
    assert trainer.load_state(state).result().path == state.path
    assert trainer.load_state_with_optimizer(state, wait=True) == state
    weights = trainer.save_weights_for_sampler("b", wait=False).result()
    sampler = client.create_sampling_client(weights)
    assert sampler.sample("a", {"max_tokens": 1}, wait=False).result()["sequences"]
    assert len(sampler.sample(["a", "b"], {"max_tokens": 1})) == 2
    assert sampler.compute_logprobs("ab", wait=False).result()[0] is None
    assert sampler.get_tokenizer().decode([97]) == trainer.get_tokenizer().decode([97]) == "a"
    trainer.log_metrics({"reward": 0.5}, step=3)
    assert trainer.read_metrics("reward")[0].value == 0.5
    assert client.attach(trainer.model_id).get_info().step == 1
    assert client.get_training_run(trainer.model_id) in client.list_training_runs()
    assert [m.name for m in client.list_supported_models()] == ["fake"]
    assert client.list_checkpoints() == trainer.list_checkpoints() == [state, weights]
    assert client.set_checkpoint_ttl(state, 9).ttl_seconds == 9
    folder = client.export_checkpoint(state, tmp_path / "adapter")
    assert (folder / "weight.npy").is_file()
    client.delete_checkpoint(state)
    assert client.list_checkpoints(trainer.model_id) == [weights]
    loss = trainer.forward_backward_custom(DATUMS, lambda d, lp: (-lp[0].mean(), {}), wait=True)
    assert loss.metrics["loss"] == pytest.approx(trainer.forward(DATUMS, wait=True).metrics["loss"])


def test_a_wait_that_ends_early_leaves_things_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    release = threading.Event()

    def hook(name: str, argument: object) -> None:
        if name == "gradient":
            release.wait(10)

    with embedded_fake(monkeypatch, hook=hook), ServiceClient(home=tmp_path) as client:
        trainer = client.create_model("fake")
        loss, step = trainer.forward_backward(DATUMS), trainer.optim_step(STEP)
        with pytest.raises(WaitTimeoutError):
            loss.result(timeout=0.02)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            loss.result()
        assert step.cancel()
        with pytest.raises(OperationCancelledError):
            step.result(5)
        release.set()
        assert loss.result(5).metrics["loss"] > 0
        assert trainer.optim_step(STEP, wait=True).metrics["step"] == 1


def test_errors_come_through_as_they_are(client: ServiceClient) -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'fake'"):
        client.create_model("fakke")
    with pytest.raises(ZeroDivisionError):
        client.create_model("fake").forward_backward_custom(DATUMS, lambda d, lp: 1 / 0, wait=True)


def test_it_may_be_used_from_many_threads(client: ServiceClient) -> None:
    trainer = client.create_model("fake")
    steps: list[float] = []

    def work() -> None:
        for _ in range(5):
            trainer.forward_backward(DATUMS, wait=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    steps.append(trainer.optim_step(STEP, wait=True).metrics["step"])
    assert steps == [1]


def test_it_works_below_a_running_event_loop(client: ServiceClient) -> None:
    async def main() -> int:
        return len(client.list_supported_models())

    assert asyncio.run(main()) == 1


def test_its_own_event_loop_cannot_wait_for_itself(client: ServiceClient) -> None:
    trainer = client.create_model("fake")

    async def inside() -> Handle[Any]:
        pending = Handle(trainer._inner.forward_backward(DATUMS), client._portal)
        for call in (lambda: trainer.optim_step(STEP), client.list_training_runs, pending.result):
            with pytest.raises(RuntimeError, match="event loop"):
                call()
        return pending

    assert client._portal.call(inside).result(5).metrics["loss"] > 0


def test_closing_fails_what_is_pending_and_ends_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_thread_left: Callable[[], None]
) -> None:
    release, computed = threading.Event(), threading.Event()

    def hook(name: str, argument: object) -> None:
        if name == "gradient":
            release.wait(20)
            computed.set()

    with embedded_fake(monkeypatch, hook=hook):
        client = ServiceClient(home=tmp_path)
        trainer = client.create_model("fake")
        saved = trainer.save_state("kept")
        pending = trainer.forward_backward(DATUMS)
        waiter: list[BaseException] = []

        def wait() -> None:
            try:
                pending.result()
            except ClosedError as error:
                waiter.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        client.close()
        client.close()
        assert not computed.is_set()  # it did not wait for the pass
        release.set()
        thread.join(5)
        assert len(waiter) == 1
        for call in (client.list_training_runs, pending.result, trainer.get_info):
            with pytest.raises(ClosedError):
                call()
        no_thread_left()
        with ServiceClient(home=tmp_path) as again:
            assert again.list_checkpoints() == [saved]


def test_a_client_that_is_forgotten_closes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_thread_left: Callable[[], None]
) -> None:
    with embedded_fake(monkeypatch):
        trainer = ServiceClient(home=tmp_path).create_model("fake")
        gc.collect()
        assert trainer.forward(DATUMS, wait=True).metrics["loss"] > 0  # it keeps the service open
        del trainer
        gc.collect()


def test_a_constructor_that_fails_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, no_thread_left: Callable[[], None]
) -> None:
    def no_torch(settings: object) -> None:
        raise MissingDependencyError("no torch")

    monkeypatch.setattr("weaver.client.opening._torch_engine", no_torch)
    with pytest.raises(MissingDependencyError):
        ServiceClient()


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "del client"])
def test_the_interpreter_exits_with_work_pending(ending: str, tmp_path: Path) -> None:
    script = f"""
import sys, time, weaver
from weaver.client import opening
from tests.fake_engine import FakeEngine
def hook(name, argument):
    if name == "gradient": time.sleep(0.3)
opening._torch_engine = lambda settings: FakeEngine(hook=hook)
client = weaver.ServiceClient(home={str(tmp_path)!r})
trainer = client.create_model("fake")
datum = weaver.Datum(model_input=[1, 2], loss_fn_inputs={{"target_tokens": [2, 3]}})
handles = [trainer.forward_backward([datum]) for _ in range(50)]
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (3 if "3" in ending else 0, "")


PAIRS = [
    (weaver.AsyncServiceClient, ServiceClient),
    (weaver.AsyncTrainingClient, TrainingClient),
    (weaver.AsyncSamplingClient, SamplingClient),
    (weaver.AsyncRewardClient, RewardClient),
]
ONLY_ASYNC = {"stream"}
LATER = {
    "forward",
    "forward_backward",
    "forward_backward_custom",
    "optim_step",
    "load_state",
    "load_state_with_optimizer",
}
"""What does not wait by default, as the reference has it."""


@pytest.mark.parametrize(("twin", "cls"), PAIRS)
def test_sync_and_async_signatures_agree(twin: type, cls: type) -> None:
    def public(kind: type) -> dict[str, Any]:
        names = {name for one in kind.__mro__[:-1] for name in vars(one)}
        return {name: getattr(kind, name) for name in names if not name.startswith("_")}

    theirs, ours = public(twin), public(cls)
    methods = {name for name, value in theirs.items() if callable(value)} - ONLY_ASYNC
    assert methods == {name for name, value in ours.items() if callable(value)}
    for name in {*methods, "__init__"} if cls is ServiceClient else methods:
        their = [
            parameter
            for parameter in inspect.signature(getattr(twin, name)).parameters.values()
            if parameter.name != "service"  # it belongs to an event loop
        ]
        our = inspect.signature(getattr(cls, name)).parameters
        mine = [p for p in our.values() if p.name != "wait"]
        assert [(p.name, p.kind, p.default) for p in mine] == [
            (p.name, p.kind, p.default) for p in their
        ]


SHARED = {
    "forward_backward": TrainingClient.forward,
    "load_state_with_optimizer": TrainingClient.load_state,
    "score": RewardClient.score,
}
"""Methods whose overloads are those of another one."""


@pytest.mark.parametrize(("twin", "cls"), PAIRS[1:])
def test_what_a_type_checker_sees_agrees_too(twin: type, cls: type) -> None:
    def shape(function: Any) -> list[Any]:
        parameters = inspect.signature(function).parameters.values()
        return [
            (p.name, p.kind, p.default is p.empty, p.annotation)
            for p in parameters
            if p.name != "wait"
        ]

    def result(function: Any) -> str:
        answer: str = function.__annotations__["return"]
        prefix = "OperationHandle["
        return answer[len(prefix) : -1] if answer.startswith(prefix) else answer

    found = 0
    for name, method in vars(cls).items():
        if not callable(method) or "wait" not in inspect.signature(method).parameters:
            continue
        default = inspect.signature(method).parameters["wait"].default
        assert default is (name not in LATER)
        theirs = get_overloads(getattr(twin, name)) or [getattr(twin, name)]
        expected = []
        for their in theirs:
            kinds = [("Now", result(their)), ("Later", f"Handle[{result(their)}]")]
            expected += [(shape(their), *kind) for kind in kinds]
        mine = [
            (shape(f), f.__annotations__["wait"], result(f))
            for f in get_overloads(SHARED.get(name, method))
        ]
        assert sorted(mine, key=str) == sorted(expected, key=str)
        found += 1
    assert found


def test_every_public_method_is_documented() -> None:
    for twin, cls in PAIRS:
        for kind in (twin, cls):
            for name, value in vars(kind).items():
                if callable(value) and not name.startswith("_"):
                    assert inspect.getdoc(value), f"{kind.__name__}.{name}"
