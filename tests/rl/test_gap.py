"""How far trainer and sampler may differ: by dtype and choice, in every way to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import weaver_rl as rl
from recipes import custom_reward, importance_sampling, rejection_sampling
from weaver import AsyncServiceClient
from weaver.errors import ConfigError
from weaver.types import ModelInfo, SamplingParams
from weaver_rl.storage import read_lines
from weaver_rl.tasks.words import exact, reverse_tasks

if TYPE_CHECKING:
    from pathlib import Path

FEW: dict[str, Any] = {"groups_per_step": 3, "group_size": 4}


def model(dtype: Any) -> ModelInfo:
    return ModelInfo(
        name="x", architecture="x", vocab_size=9, context_length=9, num_parameters=9, dtype=dtype
    )


@pytest.mark.parametrize(
    ("dtype", "temperature", "most"),
    [("float32", 1.0, 1e-4), ("float32", 0.1, 1e-3), ("float32", 2.0, 1e-4), ("bfloat16", 1, 1.0)],
)
def test_the_bound_follows_dtype_and_temperature(
    dtype: str, temperature: float, most: float
) -> None:
    assert rl.rounding_gap(model(dtype), temperature=temperature) == pytest.approx(most)
    rl.check_gap(most * 0.99, model(dtype), temperature=temperature)
    rl.check_gap(most * 1e6, model(dtype), allowed=None)
    rl.check_gap(most * 1.01, model(dtype), allowed=most * 2)
    with pytest.raises(rl.LogprobGapError, match=dtype):
        rl.check_gap(most * 1.01, model(dtype), temperature=temperature)
    with pytest.raises(rl.LogprobGapError):
        rl.check_gap(float("nan"), model(dtype))


def test_the_message_shows_the_digits_that_decide() -> None:
    with pytest.raises(rl.LogprobGapError, match=r"by 0\.0001004 nats .* than 0\.0001\."):
        rl.check_gap(1.0043e-4, model("float32"))
    with pytest.raises(rl.LogprobGapError, match=r"by 0\.25 nats .* than 0\.0001\."):
        rl.check_gap(0.25, model("float32"))


@pytest.mark.parametrize("value", [-1.0, float("nan"), "any"])
def test_what_is_no_bound_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_logprob_gap"):
        rl.Plan(steps=1, max_logprob_gap=value)
    with pytest.raises(ConfigError, match="max_logprob_gap"):
        rl.train("weaver-nano", reverse_tasks(4), exact, max_logprob_gap=value)


def test_bfloat16_trains_by_default_and_stops_at_a_bound_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_DTYPE", "bfloat16")
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"steps": 2, **FEW, "sampling": SamplingParams(max_tokens=8)}

    def train(**options: Any) -> rl.Trained:
        return rl.train("weaver-nano", reverse_tasks(20), exact, **given, display=False, **options)

    metrics = train().metrics
    assert 1e-4 < metrics["gap/max"] < metrics["gap/rounding"] == 1.0
    with pytest.raises(rl.LogprobGapError, match="same weights"):
        train(max_logprob_gap=1e-4)
    for recipe in (importance_sampling, rejection_sampling):
        flags = {"steps": 1, **FEW, "held_out": 4}
        recipe.main(recipe.Flags(out=tmp_path / recipe.__name__, **flags))
        with pytest.raises(rl.LogprobGapError):
            recipe.main(recipe.Flags(out=tmp_path / "no", max_logprob_gap=1e-5, **flags))
        assert len(read_lines(tmp_path / recipe.__name__ / "metrics.jsonl")) == 2
        (tmp_path / "no").rename(tmp_path / f"no-{recipe.__name__}")
    with pytest.raises(rl.LogprobGapError):
        custom_reward.main(steps=1, max_logprob_gap=1e-5)


@pytest.mark.anyio
async def test_full_fine_tuning_follows_the_dtype_that_is_sampled_in(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained is float32; its snapshots are sampled in bfloat16."""
    monkeypatch.setenv("WEAVER_DTYPE", "bfloat16")
    async with AsyncServiceClient(home=home) as service:
        trainer = await service.create_model("weaver-nano", training_mode="full_ft")
        assert trainer.model_info.dtype == "bfloat16"
        plan = rl.Plan(steps=1, **FEW, sampling=SamplingParams(max_tokens=8, temperature=0.5))
        result = await rl.on_policy(trainer, reverse_tasks(20), rl.single_turn(exact), plan)
    assert 1e-4 < result.metrics["gap/max"] < 1
    assert result.metrics["gap/rounding"] == 2.0
