"""Objectives are refused when they make no sense; q and temperature always belong together."""

from __future__ import annotations

import pytest

from weaver.errors import ConfigError, InvalidLossConfigError
from weaver.losses import LOSSES as ALL
from weaver.types import SamplingParams
from weaver_rl.objectives import (
    LOSSES,
    Behaviour,
    Objective,
    behaviour,
)
from weaver_rl.plan import Plan


@pytest.mark.parametrize("name", LOSSES)
def test_every_name_is_a_loss_of_the_engine(name: str) -> None:
    objective = Plan(steps=1, objective=name).loss
    assert name in ALL
    assert objective == Objective(loss_fn=name)
    assert Plan(steps=1, objective=objective).loss is objective


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"loss_fn": "pppo"}, "Did you mean 'ppo'"),
        ({"config": {"denominator": 3.0}}, "set by the loop"),
        ({"kl_reward": 0.01}, r"rl.credit.kl\(reference, beta=0.01\)"),
        ({"kl_loss": float("nan")}, "At least 0"),
        ({"loss_fn": "cross_entropy", "correction": "ratio"}, "no ratio"),
        ({"loss_fn": "dro", "correction": "ratio"}, "no ratio"),
    ],
)
def test_refused(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Objective(**kwargs)  # type: ignore[arg-type]


def test_gspo_weighs_rollouts_alike_unless_it_is_told_otherwise() -> None:
    assert {name: Objective(loss_fn=name).aggregate for name in LOSSES} == {
        name: "sequence" if name == "gspo" else "token" for name in LOSSES
    }
    assert Objective(loss_fn="gspo", aggregate="token").aggregate == "token"


def test_options_belong_to_their_loss() -> None:
    assert Objective(loss_fn="ppo", config={"dual_clip": 3.0}).config["dual_clip"] == 3.0
    with pytest.raises(InvalidLossConfigError, match="no option 'dual_clip'"):
        Objective(loss_fn="cispo", config={"dual_clip": 3.0})


def test_staleness_wants_a_named_correction() -> None:
    assert Plan(steps=1).loss.correction is None
    with pytest.raises(ConfigError, match="no correction"):
        Plan(steps=1, max_staleness=1)
    for name in ("ratio", "token", "sequence", "none"):
        objective = Objective(correction=name)  # type: ignore[arg-type]
        assert Plan(steps=1, objective=objective, max_staleness=8).loss is objective


@pytest.mark.parametrize(
    ("params", "want"),
    [
        (SamplingParams(), Behaviour(True, 1.0)),
        (SamplingParams(temperature=0.7), Behaviour(True, 0.7)),
        (SamplingParams(temperature=0.7, top_k=-1), Behaviour(True, 0.7)),
        (SamplingParams(temperature=0.7, top_p=0.9), Behaviour(False, 0.7)),
        (SamplingParams(temperature=1.3, top_k=9), Behaviour(False, 1.3)),
        (SamplingParams(temperature=1.3, min_p=0.1), Behaviour(False, 1.3)),
        (SamplingParams(temperature=1.3, repetition_penalty=1.1), Behaviour(False, 1.3)),
        (SamplingParams(top_k=5), Behaviour(False, 1.0)),
        (SamplingParams(min_p=0.1), Behaviour(False, 1.0)),
        (SamplingParams(repetition_penalty=1.1), Behaviour(False, 1.0)),
        (SamplingParams(presence_penalty=0.1), Behaviour(False, 1.0)),
        (SamplingParams(frequency_penalty=-0.1), Behaviour(False, 1.0)),
        (SamplingParams(temperature=0.7, logit_bias={3: 1.0}), Behaviour(False, 0.7)),
        (SamplingParams(json_schema={}), Behaviour(False, 1.0)),
        (SamplingParams(temperature=0.0), Behaviour(False, 1.0)),
    ],
)
def test_behaviour(params: SamplingParams, want: Behaviour) -> None:
    assert behaviour(params) == want
    assert want.known is (want.tempered or params.temperature in (0, 1))


def test_older_samples_need_a_q_at_their_temperature() -> None:
    filtered = SamplingParams(temperature=0.7, top_p=0.9)
    for name in ("ratio", "token", "sequence"):
        objective = Objective(correction=name)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="sampling"):
            Plan(steps=1, objective=objective, max_staleness=1, sampling=filtered)
        Plan(steps=1, objective=objective, max_staleness=1, sampling=SamplingParams(top_p=0.9))
    Plan(steps=1, objective=Objective(correction="none"), max_staleness=1, sampling=filtered)
    Plan(steps=1, sampling=filtered)
