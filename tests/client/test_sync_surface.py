"""The sync classes as an interpreter shows them: signatures, names, errors and HTML."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver import RewardClient, SamplingClient, ServiceClient, TrainingClient
from weaver.errors import CheckpointNotFoundError, NotFoundError, TokenOutOfRangeError
from weaver.server.settings import ServerSettings
from weaver.types import Datum, ModelInput

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def datum_of(tokens: list[int]) -> Datum:
    inputs = {"target_tokens": tokens, "weights": [1.0] * len(tokens)}
    return Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


CLASSES = (RewardClient, SamplingClient, ServiceClient, TrainingClient)


@pytest.fixture
def client(home: Path) -> Iterator[ServiceClient]:
    settings = ServerSettings(home=home, port=0, auth=False)
    with serving(FakeEngine(), settings) as server, ServiceClient(server.address) as client:
        yield client


@pytest.mark.parametrize("cls", CLASSES)
def test_methods_are_its_own(cls: type[Any]) -> None:
    for name, method in vars(cls).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        signature = str(inspect.signature(method))
        assert "OperationHandle" not in signature and "Async" not in signature, signature
        assert "Coroutine" not in signature and not inspect.iscoroutinefunction(method)
        assert method.__module__ == cls.__module__
        assert method.__qualname__.partition(".")[0] == cls.__name__
        assert method.__doc__
    assert inspect.signature(ServiceClient.attach).return_annotation == "TrainingClient"
    forward = inspect.signature(TrainingClient.forward)
    assert forward.return_annotation == "Handle[types.ForwardBackwardResult]"
    assert forward.parameters["wait"].default is False
    sample = inspect.signature(SamplingClient.sample)
    assert sample.return_annotation == "types.SampleResult | list[types.SampleResult]"


def test_errors_name_the_sync_method(client: ServiceClient) -> None:
    wrong: Any = client
    with pytest.raises(TypeError, match=r"^ServiceClient.attach\(\) missing 1 required"):
        wrong.attach()
    with pytest.raises(TypeError, match=r"^ServiceClient.create_model\(\) got.*'base_model'"):
        wrong.create_model(model="fake")
    model: Any = client.create_model("fake")
    with pytest.raises(TypeError, match=r"^TrainingClient.optim_step\(\) missing 1 required"):
        model.optim_step()


def test_tracebacks_are_short_and_do_not_grow(client: ServiceClient) -> None:
    def frames(call: Any) -> int:
        with pytest.raises((NotFoundError, TokenOutOfRangeError)) as raised:
            call()
        return len(traceback.extract_tb(raised.value.__traceback__))

    model = client.create_model("fake")
    datum = datum_of([1, 2, 10**6])
    assert frames(lambda: client.attach("run-nobody")) <= 3
    assert frames(lambda: client.get_training_run("run-nobody")) <= 3
    assert frames(lambda: model.forward([datum], wait=True)) <= 3
    handle = model.load_state("weaver://nobody/weights/none")
    assert frames(handle.result) == frames(handle.result) <= 3


def test_handles_show_their_state_in_a_notebook(client: ServiceClient) -> None:
    model = client.create_model("fake")
    handle = model.save_state("one", wait=False)
    assert "save" in handle._repr_html_()
    handle.result()
    shown = handle._repr_html_()
    assert "<b>done</b>" in shown and "weaver://" in shown
    failed = model.load_state("weaver://nobody/weights/none")
    with pytest.raises(CheckpointNotFoundError):
        failed.result()
    assert "<b>failed</b>" in failed._repr_html_()
    assert model._repr_html_().startswith("<code>&lt;TrainingClient")
