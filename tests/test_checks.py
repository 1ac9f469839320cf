"""Validation of losses, their options and their data."""

from __future__ import annotations

import math

import pytest

from weaver.checks import check_datums, check_loss, weights_of
from weaver.errors import (
    ContextLengthError,
    InvalidDatumError,
    InvalidLossConfigError,
    TokenOutOfRangeError,
    UnknownLossError,
    UnsupportedError,
    WeaverError,
)
from weaver.losses import LOSSES
from weaver.types import Datum, ModelInfo

MODEL = ModelInfo(
    name="small", architecture="none", vocab_size=10, context_length=8, num_parameters=1
)


def datum(tokens: list[int] | None = None, **inputs: object) -> Datum:
    tokens = tokens or [1, 2, 3]
    return Datum(
        model_input=tokens,
        loss_fn_inputs={"target_tokens": [1] * len(tokens), **inputs},
    )


def test_defaults_are_filled_in_and_what_is_off_is_left_out() -> None:
    assert check_loss("cross_entropy", None) == {"reduction": "mean", "temperature": 1.0}
    assert check_loss("ppo", {"clip_high_threshold": 1.28, "dual_clip": None}) == {
        "reduction": "mean",
        "temperature": 1.0,
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.28,
        "entropy_coef": 0.0,
        "kl_coef": 0.0,
    }


@pytest.mark.parametrize("name", ["", "Cross_Entropy", "grpo", None, 3])
def test_unknown_losses(name: object) -> None:
    with pytest.raises(UnknownLossError, match="loss_fn"):
        check_loss(name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("cross_entropy", {"clip_low_threshold": 0.8}),
        ("ppo", {"clip_low": 0.8}),
        ("ppo", {"clip_low_threshold": 1.5}),
        ("ppo", {"dual_clip": 1.0}),
        ("ppo", {"clip_low_threshold": float("nan")}),
        ("ppo", {"clip_low_threshold": "low"}),
        ("ppo", {"clip_low_threshold": True}),
        ("cross_entropy", {"temperature": 0}),
        ("cross_entropy", {"reduction": "median"}),
        ("cross_entropy", {"denominator": -1}),
        ("cross_entropy", {"denominator": 2, "reduction": "sum"}),
        ("importance_sampling", {"ratio_cap": 0}),
        ("dro", {"beta": -1}),
        ("cross_entropy", ["reduction"]),
        ("cross_entropy", {3: 1.0}),
        ("cross_entropy", {"reduction": ["sum"]}),
    ],
)
def test_bad_options(loss: str, config: dict[str, float]) -> None:
    with pytest.raises(InvalidLossConfigError, match="loss_fn_config"):
        check_loss(loss, config)


@pytest.mark.parametrize(
    ("datums", "loss", "error"),
    [
        ([], "cross_entropy", InvalidDatumError),
        (datum(), "cross_entropy", InvalidDatumError),
        ("abc", "cross_entropy", InvalidDatumError),
        ([datum(), {}], "cross_entropy", InvalidDatumError),
        ([Datum(model_input=[1])], "cross_entropy", InvalidDatumError),
        ([Datum(model_input=[])], "cross_entropy", InvalidDatumError),
        ([datum(weights=[1, 1])], "cross_entropy", InvalidDatumError),
        ([datum(weights=[[1, 1, 1]])], "cross_entropy", InvalidDatumError),
        ([datum(weights=[1, 1, float("nan")])], "cross_entropy", InvalidDatumError),
        ([datum(weights=[1, 1, float("inf")])], "cross_entropy", InvalidDatumError),
        ([datum(weights=[1, 1, -9])], "cross_entropy", InvalidDatumError),
        ([datum(weights=[1, 1, 1], loss_mask=[1, 1, 1])], "cross_entropy", InvalidDatumError),
        ([datum(advantages=[1, 1, 1])], "cross_entropy", InvalidDatumError),
        ([datum(advantages=[1, 1, 1])], "ppo", InvalidDatumError),
        ([datum(surrogate_weights=[1, 1, 1], weights=[1, 1, 1])], "surrogate", InvalidDatumError),
        ([datum([1, 2, 10])], "cross_entropy", TokenOutOfRangeError),
        ([Datum(model_input=[1], loss_fn_inputs={"target_tokens": [10]})], "cross_entropy",
         TokenOutOfRangeError),
        ([Datum(model_input=[1], loss_fn_inputs={"target_tokens": [-1]})], "cross_entropy",
         TokenOutOfRangeError),
        ([datum([1] * 9)], "cross_entropy", ContextLengthError),
    ],
)  # fmt: skip
def test_bad_data(datums: object, loss: str, error: type[WeaverError]) -> None:
    with pytest.raises(error) as caught:
        check_datums(datums, loss, model=MODEL)  # type: ignore[arg-type]
    assert caught.value.field
    assert caught.value.hint


OF_TOKENS = {name: loss for name, loss in LOSSES.items() if None in loss.heads}


@pytest.mark.parametrize("loss", OF_TOKENS)
def test_good_data_passes_every_loss(loss: str) -> None:
    inputs = {name: [0.5] * 3 for name in LOSSES[loss].inputs}
    assert check_datums([datum(**inputs)], loss, model=MODEL)


PAIRS = [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("loss", "weights"), [("cross_entropy", "weights"), ("surrogate", "surrogate_weights")]
)
def test_some_losses_take_several_targets_at_a_position(loss: str, weights: str) -> None:
    good = datum(target_tokens=PAIRS, **{weights: [[0.5, 0.5]] * 3})
    assert check_datums([good, datum(**{weights: [1, 1, 1]})], loss, model=MODEL)
    for wrong in (
        {"target_tokens": PAIRS, weights: [1, 1, 1]},
        {weights: [[0.5, 0.5]] * 3},
        {"target_tokens": PAIRS, weights: [[0.5, 0.5]] * 2},
        {"target_tokens": PAIRS[:2], weights: [[0.5, 0.5]] * 2},
        {"target_tokens": [[1] * 257] * 3, weights: [[1] * 257] * 3},
        {"target_tokens": [[]] * 3, weights: [[]] * 3},
        {"target_tokens": [[[1]]] * 3, weights: [[[1.0]]] * 3},
        {"target_tokens": PAIRS, weights: [[0.5, float("nan")]] * 3},
    ):
        with pytest.raises(InvalidDatumError, match=r"datums\[1\]"):
            check_datums([good, datum(**wrong)], loss, model=MODEL)
    for token in (-1, 10):
        bad = datum(target_tokens=[[1, token]] * 3, **{weights: [[0.5, 0.5]] * 3})
        with pytest.raises(TokenOutOfRangeError, match="target_tokens"):
            check_datums([bad], loss, model=MODEL)


@pytest.mark.parametrize("loss", [name for name, loss in OF_TOKENS.items() if not loss.several])
def test_others_take_one(loss: str) -> None:
    inputs = {name: [[0.5, 0.5]] * 3 for name in LOSSES[loss].inputs}
    with pytest.raises(InvalidDatumError, match="one value per token"):
        check_datums([datum(target_tokens=PAIRS, **inputs)], loss, model=MODEL)


def test_weights_are_one_where_absent() -> None:
    assert weights_of(datum()).tolist() == [1, 1, 1]
    assert weights_of(datum(target_tokens=PAIRS)).tolist() == [[1, 1]] * 3
    assert weights_of(datum(loss_mask=[0, 1, 0])).tolist() == [0, 1, 0]


def test_negative_weights_are_fine_without_a_mean() -> None:
    check_datums([datum(weights=[-1, 0, 0])], "cross_entropy", config={"reduction": "sum"})


def side(tokens: list[int], **inputs: object) -> Datum:
    return Datum(model_input=tokens, loss_fn_inputs=inputs)


def test_pairs_and_scores_pass_with_a_scalar_head() -> None:
    pair = [side([1, 2], margin=[0.5], weights=[2.0]), side([1, 3, 4])]
    filled = check_datums(pair * 2, "bradley_terry", config={"centre": 0.1}, head="scalar")
    assert filled == {"reduction": "mean", "temperature": 1.0, "centre": 0.1}
    check_datums([side([1], surrogate_weights=[0.5])], "surrogate", head="scalar")


@pytest.mark.parametrize(
    ("datums", "loss", "error", "field"),
    [
        ([side([1])], "bradley_terry", InvalidDatumError, "datums[0]"),
        ([side([1]), side([2]), side([3])], "bradley_terry", InvalidDatumError, "datums[2]"),
        ([side([1, 2]), side([1, 2])], "bradley_terry", InvalidDatumError, "datums[1]"),
        ([side([1]), side([2], margin=[1.0])], "bradley_terry", InvalidDatumError, "datums[1]"),
        ([side([1], margin=[1.0, 2.0]), side([2])], "bradley_terry", InvalidDatumError, "margin"),
        ([side([1], margin=[math.nan]), side([2])], "bradley_terry", InvalidDatumError, "margin"),
        (
            [side([1], target_tokens=[2]), side([2])],
            "bradley_terry",
            InvalidDatumError,
            "datums[0]",
        ),
        ([side([]), side([2])], "bradley_terry", InvalidDatumError, "datums[0]"),
        ([side([99]), side([2])], "bradley_terry", TokenOutOfRangeError, "datums[0]"),
        ([side([1] * 9), side([2])], "bradley_terry", ContextLengthError, "datums[0]"),
        ([side([1])], "surrogate", InvalidDatumError, "datums[0]"),
        ([datum()], "cross_entropy", UnsupportedError, "loss_fn"),
        ([datum()], "ppo", UnsupportedError, "loss_fn"),
    ],
)
def test_bad_data_of_a_scalar_head(
    datums: list[Datum], loss: str, error: type[WeaverError], field: str
) -> None:
    with pytest.raises(error) as caught:
        check_datums(datums, loss, model=MODEL, head="scalar")
    assert field in str(caught.value.field)
    assert caught.value.hint


def test_a_loss_of_scores_is_refused_where_there_are_tokens_and_a_temperature_with_scores() -> None:
    pair = [side([1]), side([2])]
    with pytest.raises(UnsupportedError, match="scalar"):
        check_datums(pair, "bradley_terry")
    for config in ({"temperature": 2.0}, {"centre": -1.0}, {"margin": 1.0}):
        with pytest.raises(InvalidLossConfigError):
            check_datums(pair, "bradley_terry", config=config, head="scalar")
