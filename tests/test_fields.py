"""Every text that an operation brings has a bound, and a problem costs little to describe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import TypeAdapter

from weaver import protocol, types
from weaver.errors import InvalidRequestError, WeaverError, nearest
from weaver.tensors import TensorData

if TYPE_CHECKING:
    from collections.abc import Iterator

FREE = {"user_metadata", "tool_calls"}
"""Free-form: bounded by the service, and as a whole."""
HUGE = "x" * (2**24 + 1)
FORWARD = {"datums": (), "loss_fn": "ppo"}
LONG: dict[str, Any] = {
    "note": lambda: protocol.Submission(id="a", operation=None, note="x" * 1025),
    "id": lambda: protocol.Submission(id="x" * 257, operation=None),
    "base_model": lambda: protocol.CreateModel(base_model="x" * 4097),
    "loss_fn": lambda: protocol.ForwardBackward(datums=(), loss_fn="x" * 257),
    "option": lambda: protocol.ForwardBackward(**FORWARD, loss_fn_config={"x" * 257: 1}),
    "option's value": lambda: protocol.ForwardBackward(**FORWARD, loss_fn_config={"a": "x" * 257}),
    "options": lambda: protocol.ForwardBackward(
        **FORWARD, loss_fn_config={f"a{i}": 1 for i in range(65)}
    ),
    "label": lambda: protocol.ForwardBackward(**FORWARD, labels=("x" * 257,)),
    "input": lambda: types.Datum(model_input=[1], loss_fn_inputs={"x" * 257: [1]}),
    "inputs": lambda: types.Datum(
        model_input=[1], loss_fn_inputs={f"a{i}": [1] for i in range(65)}
    ),
    "checkpoint": lambda: protocol.SaveCheckpoint(purpose="state", name="x" * 257),
    "path": lambda: protocol.LoadCheckpoint(path="x" * 4097),
    "model_path": lambda: protocol.OpenSampler(model_path="x" * 4097),
    "sampler_id": lambda: protocol.Sample(sampler_id="x" * 4097, prompt="x"),
    "prompt": lambda: protocol.Sample(sampler_id="s", prompt=HUGE),
    "content": lambda: types.Message(role="user", content=HUGE),
    "role": lambda: types.Message(role="x" * 257, content=""),
    "stop": lambda: types.SamplingParams(stop=["x" * 1025]),
    "stops": lambda: types.SamplingParams(stop=["x"] * 257),
    "metric": lambda: types.MetricPoint(name="x" * 257, value=1.0),
    "call": lambda: types.Message(role="a", content="", tool_calls=[{"a": "x" * 2**20}]),
    "thing": lambda: types.Message(role="a", content="", tool_calls=[{"a": object()}]),
    "calls": lambda: types.Message(role="a", content="", tool_calls=[{}] * 129),
}


@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_what_is_too_long_is_refused_by_name(make: Any) -> None:
    with pytest.raises(InvalidRequestError):
        make()


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    """Where in a schema of pydantic a text may be as long as one likes."""
    if isinstance(schema, list):
        for item in schema:
            yield from unbounded(item, path)
    elif isinstance(schema, dict):
        if schema.get("type") == "str" and "max_length" not in schema:
            yield path
        for key, item in schema.items():
            if key not in (*FREE, "serialization", "metadata"):
                yield from unbounded(item, f"{path}.{key}")


def test_no_text_of_a_submission_is_without_a_bound() -> None:
    assert list(unbounded(TypeAdapter(protocol.Submission).core_schema)) == []
    assert list(unbounded(TypeAdapter(types.MetricPoint).core_schema)) == []
    assert len(list(unbounded(TypeAdapter(types.ModelInfo).core_schema))) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: protocol.Submission(id=b"a", operation=None),
        lambda: protocol.Submission(id="a", operation=None, note=b"a"),
        lambda: protocol.Sample(sampler_id=b"s", prompt="x"),
        lambda: protocol.Sample(sampler_id="s", prompt=b"x"),
        lambda: protocol.CreateModel(base_model=b"m"),
        lambda: types.Message(role="user", content=b"x"),
        lambda: types.SamplingParams(stop=[b"x"]),
        lambda: types.MetricPoint(name=b"x", value=1.0),
    ],
)
def test_bytes_are_no_text(make: Any) -> None:
    with pytest.raises(InvalidRequestError):
        make()


MANY = 300_000
COSTLY: dict[str, Any] = {
    "options": lambda: protocol.ForwardBackward(
        **FORWARD, loss_fn_config={f"k{i}": [] for i in range(MANY)}
    ),
    "datums": lambda: protocol.ForwardBackward(datums=[{}] * MANY, loss_fn="ppo"),
    "messages": lambda: protocol.Sample(sampler_id="s", prompt=[{}] * MANY),
    "chunks": lambda: types.ModelInput(chunks=[{}] * MANY),
    "stops": lambda: types.SamplingParams(stop=[1] * MANY),
    "unknown fields": lambda: types.AdamParams(**{f"k{i}": 1 for i in range(MANY)}),
    "a long name": lambda: types.AdamParams(**{"k" * 10**7: 1}),
    "a value with much in it": lambda: types.AdamParams(learning_rate=[[0] * MANY] * 100),
    "a text in an array": lambda: TensorData(["x" * 10**6, *[""] * MANY]),
    "a text in an array of arrays": lambda: TensorData([["x" * 10**6], *[[""]] * MANY]),
}


@pytest.mark.parametrize("make", COSTLY.values(), ids=COSTLY)
def test_a_problem_is_described_at_once_however_often_it_is_there(make: Any) -> None:
    begin = time.process_time()
    with pytest.raises(WeaverError) as caught:
        make()
    assert time.process_time() - begin < 5.0  # 26 s, were each described
    assert len(str(caught.value)) < 1000


def test_the_nearest_of_a_long_name_is_not_looked_for_long() -> None:
    begin = time.process_time()
    nearest("x" * 10**7, ["ppo", "dro"])
    assert time.process_time() - begin < 0.5
