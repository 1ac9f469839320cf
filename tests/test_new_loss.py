"""A loss that one class declares trains, and is checked, through client, service and engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from weaver import Datum, ServiceClient
from weaver.errors import InvalidDatumError, InvalidLossConfigError, UnknownLossError, WeaverError
from weaver.losses import LOSSES, Loss, TokenLoss, Tokens, option

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weaver import TrainingClient


class Focal(Loss):
    """-b·(1 - p)^γ·lp: the focal loss (arXiv:1708.02002, eq. 5), b a factor of each token."""

    name = "focal"
    inputs = ("factors",)
    gamma: float = option(2.0, at_least=0.0)
    least: float = option(0.0, above=-1.0)
    most: float = option(1.0)

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise InvalidLossConfigError(
                "least is above most.", field="loss_fn_config", hint="Swap them."
            )

    def per_token(self, tokens: Tokens) -> TokenLoss:
        factors = tokens.inputs["factors"].clamp(self.least, self.most)
        return TokenLoss(-factors * (1 - tokens.lp.exp()) ** self.gamma * tokens.lp)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainingClient]:
    monkeypatch.setitem(LOSSES, Focal.name, Focal)
    with ServiceClient(home=tmp_path) as service:
        yield service.create_model("weaver-nano", {"rank": 4})


def datum(**inputs: object) -> Datum:
    return Datum(
        model_input=[10, 11, 12, 13], loss_fn_inputs={"target_tokens": [11, 12, 13, 14], **inputs}
    )


def test_it_trains_and_is_what_its_formula_says(trainer: TrainingClient) -> None:
    factors, weights = np.array([1.0, 0.5, 3.0, 0.25]), np.array([1.0, 2.0, 1.0, 0.0])
    batch = [datum(factors=factors, weights=weights)]
    results = []
    for _ in range(4):
        options = {"gamma": 1.5, "most": 2.0}
        results.append(trainer.forward_backward(batch, "focal", loss_fn_config=options, wait=True))
        trainer.optim_step({"learning_rate": 3e-3}, wait=True)
    for result in results:
        lp = result.loss_fn_outputs[0]["logprobs"].to_numpy().astype(float)
        value = -np.minimum(factors, 2.0) * (1 - np.exp(lp)) ** 1.5 * lp
        assert result.metrics["loss"] == pytest.approx(weights @ value / weights.sum(), rel=1e-6)
    losses = [result.metrics["loss"] for result in results]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


WRONG = [
    ({}, {}, InvalidDatumError, "focal needs 'factors'.*It takes target_tokens, factors"),
    ({"factor": [1] * 4, "factors": [1] * 4}, {}, InvalidDatumError, "Did you mean 'factors'"),
    ({"factors": [1] * 3}, {}, InvalidDatumError, "shape"),
    ({"factors": [1] * 4}, {"gama": 1}, InvalidLossConfigError, "Did you mean 'gamma'"),
    ({"factors": [1] * 4}, {"gamma": -1}, InvalidLossConfigError, "gamma.*Must be at least 0"),
    ({"factors": [1] * 4}, {"least": -1}, InvalidLossConfigError, "Must be above -1"),
    ({"factors": [1] * 4}, {"least": 3}, InvalidLossConfigError, "least is above most"),
]


@pytest.mark.parametrize(("inputs", "config", "error", "match"), WRONG)
@pytest.mark.parametrize("by", ["client", "service"])
def test_what_is_wrong_is_told(
    trainer: TrainingClient,
    monkeypatch: pytest.MonkeyPatch,
    inputs: dict[str, object],
    config: dict[str, float],
    error: type[WeaverError],
    match: str,
    by: str,
) -> None:
    if by == "service":
        monkeypatch.setattr("weaver.client.training.check_datums", lambda *given, **options: None)
    with pytest.raises(error, match=match):
        trainer.forward_backward([datum(**inputs)], "focal", loss_fn_config=config, wait=True)


def test_without_its_class_nobody_knows_it(trainer: TrainingClient) -> None:
    del LOSSES["focal"]
    with pytest.raises(UnknownLossError, match="no loss is called 'focal'"):
        trainer.forward_backward([datum(factors=[1] * 4)], "focal", wait=True)
