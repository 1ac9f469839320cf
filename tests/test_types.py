"""The values: documented shapes, defaults, mapping access, and errors that name the field."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from weaver import types
from weaver.errors import InvalidDatumError, InvalidParamsError, InvalidRequestError


def test_defaults_are_the_documented_ones() -> None:
    adam = types.AdamParams()
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.eps) == (1e-4, 0.9, 0.999, 1e-8)
    assert (adam.weight_decay, adam.grad_clip_norm) == (0, 0)
    sampling = types.SamplingParams()
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
        100,
        1.0,
        1.0,
        0,
    )
    assert (sampling.stop, sampling.repetition_penalty, sampling.seed) == ((), 1.0, None)
    assert types.SamplingParams(stop="\n").stop == ("\n",)
    assert types.SamplingParams(stop=["\n", "END"]).stop == ("\n", "END")


def test_model_input() -> None:
    value = types.ModelInput.from_ints(torch.tensor([1, 2, 3]))
    assert (value.to_ints(), value.length) == ([1, 2, 3], 3)
    assert types.ModelInput.empty().append_int(4).append_int(5).to_ints() == [4, 5]
    assert value == types.ModelInput.from_ints(np.array([1, 2, 3]))


def test_datum_takes_arrays_of_any_kind() -> None:
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": np.array([2, 3], dtype=np.int32), "weights": [0, 1]},
    )
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert datum.loss_fn_inputs["weights"].dtype == "float32"
    assert datum["model_input"]["chunks"][0]["tokens"] == (1, 2)
    assert types.Datum(model_input=[1, 2]).model_input.length == 2
    assert pickle.loads(pickle.dumps(datum)) == datum


def test_results_read_as_the_documented_mappings() -> None:
    result = types.ForwardBackwardResult(loss_fn_outputs=(), metrics={"loss": 0.5})
    assert result["result"]["metrics"]["loss"] == 0.5
    assert result.get("result", {}).get("metrics", {}).get("loss") == 0.5
    assert result.metrics["loss"] == result.result.metrics["loss"]
    assert isinstance(result, Mapping)
    assert dict(result) == {"loss_fn_outputs": (), "metrics": {"loss": 0.5}}
    assert "result" in result
    assert "loss" not in result
    assert list(result) == list(result.keys()) == ["loss_fn_outputs", "metrics"]
    assert (len(result), list(result.values())) == (2, [(), {"loss": 0.5}])
    with pytest.raises(KeyError):
        result["nothing"]


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        types.AdamParams().learning_rate = 1.0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: types.AdamParams(learning_rate=-1), "learning_rate"),
        (lambda: types.AdamParams(learning_rate=float("nan")), "learning_rate"),
        (lambda: types.AdamParams(learning_rate="fast"), "learning_rate"),
        (lambda: types.AdamParams(beta1=1.0), "beta1"),
        (lambda: types.AdamParams(eps=0), "eps"),
        (lambda: types.AdamParams(lr=1e-3), "lr"),
        (lambda: types.SamplingParams(max_tokens=0), "max_tokens"),
        (lambda: types.SamplingParams(temperature=-0.1), "temperature"),
        (lambda: types.SamplingParams(temperature=float("inf")), "temperature"),
        (lambda: types.SamplingParams(top_p=0), "top_p"),
        (lambda: types.SamplingParams(top_p=1.1), "top_p"),
        (lambda: types.SamplingParams(top_k=-2), "top_k"),
        (lambda: types.SamplingParams(min_p=2), "min_p"),
        (lambda: types.SamplingParams(stop=[""]), "stop"),
        (lambda: types.SamplingParams(stop=[3]), "stop"),
        (lambda: types.SamplingParams(seed=-1), "seed"),
        (lambda: types.SamplingParams(repetition_penalty=0), "repetition_penalty"),
        (lambda: types.LoraConfig(rank=0), "rank"),
        (lambda: types.LoraConfig(rank=10**6), "rank"),
        (lambda: types.LoraConfig(rank=8, dropout=0.1), "dropout"),
        (lambda: types.Message(role="user"), "content"),
    ],
)
def test_a_bad_parameter_is_named(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        make()
    assert str(caught.value).startswith(field)
    assert caught.value.hint


@pytest.mark.parametrize(
    "make",
    [
        lambda: types.ModelInput.from_ints([1, -2]),
        lambda: types.ModelInput.from_ints([0.5]),
        lambda: types.ModelInput.from_ints("text"),
        lambda: types.Datum(model_input=None),
        lambda: types.Datum(model_input=[1], loss_fn_inputs=[1]),
        lambda: types.Datum(model_input=[1], loss_fn_inputs={"target_tokens": [1.5]}),
        lambda: types.Datum(model_input=[1], loss_fn_inputs={"weights": ["a"]}),
        lambda: types.Datum(loss_fn_inputs={}),
        lambda: types.Datum(model_input=[1], inputs={}),
    ],
)
def test_a_bad_datum_is_named(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidDatumError) as caught:
        make()
    assert caught.value.code == "invalid_datum"
    assert caught.value.field


def test_an_unknown_field_gets_the_nearest_name() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean 'learning_rate'"):
        types.AdamParams(learning_rat=1e-3)
