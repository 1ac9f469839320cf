"""The policy loops on the fake engine: they learn, pipeline, record, resume and refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.rl.fake import fake_service, vowels
from weaver.errors import ConfigError, InvalidRequestError
from weaver.types import AdamParams, ModelInfo, SamplingParams
from weaver_rl import credit
from weaver_rl.agent import derive_seed
from weaver_rl.algorithms.policy import off_policy, on_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.algorithms.step import policy_step
from weaver_rl.algorithms.supervised import SupervisedPlan
from weaver_rl.data import TaskStream
from weaver_rl.loggers import Loggers
from weaver_rl.objectives import Objective
from weaver_rl.plan import LogprobGapError, Plan
from weaver_rl.rollouts import RolloutsFailedError, sample_groups, single_turn
from weaver_rl.run_folder import manifests, open_run_folder
from weaver_rl.transcripts import read_transcripts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weaver import AsyncTrainingClient
    from weaver_rl.agent import Agent
    from weaver_rl.types import Group, Reply, Task

TASKS = [{"prompt": f"{i}="} for i in range(10)]
PLAN = Plan(
    steps=6,
    groups_per_step=4,
    group_size=4,
    learning_rate=0.2,
    sampling=SamplingParams(max_tokens=6),
    seed=7,
)
RATIO = Objective(correction="ratio")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Memory:
    """A logger that keeps what it is told."""

    name = "memory"

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows[step] = dict(metrics)

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        assert groups

    def state(self) -> Mapping[str, str]:
        return {"id": "m1"}

    def close(self) -> None:
        pass


async def weights(trainer: AsyncTrainingClient) -> list[float | None]:
    """Log-probabilities of a text, which tell any two weights apart."""
    sampler = await trainer.save_weights_and_get_sampling_client()
    return await sampler.compute_logprobs("the quick brown fox")


async def trained(
    home: Path, plan: Plan, *, run: Run | None = None, reference: bool = False
) -> tuple[list[float | None], dict[int, dict[str, float]]]:
    memory = Memory()
    run = run or Run()
    run.loggers = Loggers(memory)
    async with fake_service(home) as service:
        trainer = await service.create_model(base_model="fake")
        base = await service.create_sampling_client(base_model="fake") if reference else None
        await off_policy(trainer, TASKS, single_turn(vowels), plan, run=run, reference=base)
        return await weights(trainer), memory.rows


def without_times(rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
        for step, row in rows.items()
    }


VARIANTS = {
    "importance_sampling": {},
    "ppo": {"objective": Objective(loss_fn="ppo", config={"dual_clip": 3.0}), "passes": 2},
    "cispo": {"objective": "cispo", "minibatches": 2},
    "sequence_mean": {"objective": Objective(aggregate="sequence")},
    "dro": {"objective": "dro"},
    "cross_entropy": {"objective": "cross_entropy"},
    "dr_grpo": {"objective": Objective(aggregate="constant"), "advantage": "dr_grpo"},
    "tempered": {"sampling": SamplingParams(max_tokens=6, temperature=0.7)},
    "filtered": {"sampling": SamplingParams(max_tokens=6, temperature=0.7, top_p=0.999)},
    "token": {"objective": Objective(correction="token")},
    "sequence": {"objective": Objective(correction="sequence")},
    "whitened": {"credit": credit.whitened(credit.total(credit.outcome("raw")))},
    "turns": {"credit": credit.total(credit.outcome(), credit.turns())},
    "unless": {"credit": credit.unless(lambda rollout: rollout.reward == 0, credit.outcome())},
    "kl_loss": {"objective": Objective(kl_loss=0.01)},
    "standardised": {"advantage": "standardised", "zero_variance": "drop"},
    "resample": {"zero_variance": "resample"},
    "async": {"max_staleness": 2, "objective": RATIO},
    "async_sequence": {"max_staleness": 2, "objective": Objective(correction="sequence")},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name: str, tmp_path: Path) -> None:
    plan = replace(PLAN, steps=20, **VARIANTS[name])
    _, rows = anyio.run(lambda: trained(tmp_path, plan, reference=name.startswith("kl")))
    assert sorted(rows) == list(range(1, 21))
    before = sum(rows[step]["reward/mean"] for step in (1, 2)) / 2
    after = sum(rows[step]["reward/mean"] for step in (19, 20)) / 2
    assert after > before + 0.15
    for step, row in rows.items():
        assert row.get("gap/max", 0.0) <= 1e-4
        if plan.max_staleness == 0:
            assert "gap/max" in row
            assert row["staleness/max"] == 0
        else:
            assert row["staleness/max"] == min(step - 1, plan.max_staleness)


@pytest.mark.anyio
async def test_staleness_zero_is_the_synchronous_loop(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        stream = TaskStream(TASKS, seed=PLAN.seed)
        for step in range(PLAN.steps):  # written out: play with the weights of now, then train
            groups = await sample_groups(
                await trainer.save_weights_and_get_sampling_client(),
                stream.take(PLAN.groups_per_step),
                single_turn(vowels),
                group_size=PLAN.group_size,
                sampling=PLAN.sampling,
                seed=derive_seed(PLAN.seed, step, 0),
            )
            await policy_step(trainer, groups, PLAN, step=step, version=step)
        synchronous = await weights(trainer)
    for loop in (on_policy, off_policy):
        async with fake_service(tmp_path / loop.__name__) as service:
            trainer = await service.create_model(base_model="fake")
            await loop(trainer, TASKS, single_turn(vowels), PLAN)
            assert await weights(trainer) == synchronous


@pytest.mark.anyio
async def test_what_is_compared_is_the_first_pass(tmp_path: Path) -> None:
    """Also where a step has fewer rollouts than minibatches."""
    trained = []
    for passes in (1, 2):
        plan = replace(PLAN, passes=passes, minibatches=4, learning_rate=0.5)
        async with fake_service(tmp_path / str(passes)) as service:
            trainer = await service.create_model(base_model="fake")
            groups = await sample_groups(
                await trainer.save_weights_and_get_sampling_client(),
                TASKS[:1],
                single_turn(vowels),
                group_size=2,
                sampling=PLAN.sampling,
                seed=0,
            )
            stepped = await policy_step(trainer, groups, plan, step=0, version=0)
        assert stepped.version == 2 * passes
        trained.append([logprobs_N.tolist() for _, logprobs_N in stepped.trained])
    assert trained[0] == trained[1]


@pytest.mark.anyio
@pytest.mark.parametrize("staleness", [0, 3])
async def test_the_same_seed_twice(staleness: int, tmp_path: Path) -> None:
    plan = replace(PLAN, max_staleness=staleness, objective=RATIO, minibatches=2)
    first, rows = await trained(tmp_path / "1", plan)
    second, again = await trained(tmp_path / "2", plan)
    assert first == second
    assert without_times(rows) == without_times(again)
    other, _ = await trained(tmp_path / "3", replace(plan, seed=8))
    assert other != first


@pytest.mark.anyio
@pytest.mark.parametrize("staleness", [0, 3])
@pytest.mark.parametrize("stop", [1, 4, 5])
async def test_a_resumed_run_is_exact(staleness: int, stop: int, tmp_path: Path) -> None:
    plan = replace(PLAN, max_staleness=staleness, objective=RATIO)
    whole, rows = await trained(tmp_path / "1", plan)
    folder = open_run_folder(tmp_path / "run", plan.as_config())

    class Killed(Exception):
        pass

    class Bomb(Run):
        async def log(self, metrics: Mapping[str, float], *, step: int) -> None:
            if step > stop:
                raise Killed

    def bomb() -> Run:
        return Bomb(folder=folder, checkpoint_every=2)

    with pytest.raises(Killed):
        await trained(tmp_path / "2", plan, run=bomb())
    resumed = Run(folder=folder, checkpoint_every=2)
    got, rest = await trained(tmp_path / "2", plan, run=resumed)
    assert sorted(rest) == list(range(stop // 2 * 2 + 1, plan.steps + 1))
    assert got == whole
    assert without_times(rest) == {k: v for k, v in without_times(rows).items() if k in rest}
    assert len(read_transcripts(folder.transcripts, plan.steps)) == 16


@pytest.mark.anyio
async def test_an_inexact_resume_is_refused_or_asked_for(tmp_path: Path) -> None:
    plan = replace(PLAN, max_staleness=1, objective=RATIO)
    folder = open_run_folder(tmp_path / "run", {})
    async with fake_service(tmp_path, deterministic=False) as service:
        trainer = await service.create_model(base_model="fake")
        environment = single_turn(vowels)
        with pytest.raises(ConfigError, match="--deterministic"):
            await off_policy(trainer, TASKS, environment, plan, run=Run(folder=folder))
        assert not folder.metrics.exists()
        await off_policy(trainer, TASKS, environment, plan, run=Run(folder=folder, exact=False))
        assert [one.step for one in manifests(folder)] == [PLAN.steps]


@pytest.mark.anyio
async def test_zero_learning_rate_changes_nothing(tmp_path: Path) -> None:
    before, _ = await trained(tmp_path / "1", replace(PLAN, steps=0))
    after, _ = await trained(tmp_path / "2", replace(PLAN, learning_rate=0.0))
    assert after == before


@pytest.mark.anyio
@pytest.mark.parametrize("change", [{}, {"passes": 2, "minibatches": 2, "objective": "ppo"}])
async def test_a_filter_leaves_the_temperature_that_is_trained_at(
    change: dict[str, Any], tmp_path: Path
) -> None:
    plain = replace(PLAN, sampling=SamplingParams(max_tokens=6, temperature=0.6), **change)
    unfelt = plain.sampling.model_copy(update={"top_p": 1 - 1e-9})
    expected, rows = await trained(tmp_path / "1", plain)
    found, filtered = await trained(tmp_path / "2", replace(plain, sampling=unfelt))
    assert found[1:] == pytest.approx(expected[1:], abs=1e-5)
    for name in ("gap/max", "off_policy/kl"):
        assert filtered[6][name] <= 1e-4
    assert filtered[6]["train/loss"] == pytest.approx(rows[6]["train/loss"], abs=1e-5)


@pytest.mark.anyio
@pytest.mark.parametrize("correction", ["ratio", "token", "sequence", "none"])
async def test_older_samples_show_whatever_corrects_them(correction: Any, tmp_path: Path) -> None:
    plan = replace(PLAN, max_staleness=2, objective=Objective(correction=correction))
    _, rows = await trained(tmp_path, plan)
    assert rows[1]["off_policy/kl"] == pytest.approx(0, abs=1e-8)
    assert rows[1]["off_policy/ess"] == pytest.approx(1, abs=1e-6)
    assert rows[6]["off_policy/kl"] > 1e-3
    assert rows[6]["off_policy/ess"] < 0.999
    assert rows[6]["off_policy/ratio_max"] > 1.01
    assert 0 <= rows[6]["off_policy/truncated_fraction"] <= 1


@pytest.mark.anyio
async def test_the_loss_holds_all_that_was_minimised(tmp_path: Path) -> None:
    plan = replace(PLAN, steps=3, objective=Objective(loss_fn="cross_entropy", kl_loss=0.5))
    _, rows = await trained(tmp_path / "1", plan, reference=True)
    _, plain = await trained(tmp_path / "2", replace(plan, objective="cross_entropy", steps=1))
    assert rows[1]["train/kl_loss"] == pytest.approx(0, abs=1e-9)
    assert rows[1]["train/loss"] == pytest.approx(plain[1]["train/loss"])
    row = rows[3]
    policy = row["train/loss_sum"] / row["tokens/sampled"]
    assert row["train/loss"] == pytest.approx(policy + row["train/kl_loss"])


@pytest.mark.anyio
async def test_without_a_rate_the_model_decides_and_gradients_are_clipped(tmp_path: Path) -> None:
    plan = Plan(steps=1, groups_per_step=2, group_size=2, sampling=PLAN.sampling)
    _, rows = await trained(tmp_path, plan)
    assert rows[1]["train/learning_rate"] == pytest.approx(1e-3)
    billions = ModelInfo(
        name="x", architecture="x", vocab_size=9, context_length=9, num_parameters=8 * 10**9
    )
    for one in (plan, SupervisedPlan()):
        adam = one.adam_params(0, billions)
        assert adam.learning_rate == pytest.approx(1.74e-5, rel=1e-2)
        assert adam.grad_clip_norm == 1.0


@pytest.mark.anyio
async def test_the_learning_rate_may_be_a_schedule(tmp_path: Path) -> None:
    _, rows = await trained(tmp_path, replace(PLAN, learning_rate=lambda step: 0.1 / (step + 1)))
    assert [row["train/learning_rate"] for row in rows.values()] == pytest.approx(
        [0.1 / (step + 1) for step in range(PLAN.steps)]
    )


@pytest.mark.anyio
async def test_no_group_teaches_anything(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        plan = replace(PLAN, zero_variance="drop", steps=2)
        result = await on_policy(trainer, TASKS, single_turn(lambda task, reply: 1.0), plan)
    assert result.version == 0
    assert result.metrics["train/skipped"] == 1.0
    assert result.metrics["groups/dropped"] == 4


@pytest.mark.anyio
async def test_several_turns(tmp_path: Path) -> None:
    async def two_turns(agent: Agent, task: Task) -> float:
        replies = [await agent.chat(text) for text in (task["prompt"], "again")]
        return sum(vowels(task, reply) for reply in replies)

    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        result = await on_policy(trainer, TASKS, two_turns, PLAN)
    assert result.metrics["rollout/turns_mean"] == 2
    assert result.metrics["gap/max"] <= 1e-4
    assert result.version == PLAN.steps


def odd_ones_fail(task: Task, reply: Reply) -> float:
    if task["prompt"] in ("1=", "3="):
        raise ValueError("no gold answer")
    return vowels(task, reply)


@pytest.mark.anyio
@pytest.mark.parametrize("staleness", [0, 2])
async def test_too_many_failures_stop_the_run(staleness: int, tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        plan = replace(PLAN, max_staleness=staleness, objective=RATIO, max_failure_rate=0.0)
        with pytest.raises(RolloutsFailedError, match="no gold answer"):
            await off_policy(trainer, TASKS, single_turn(odd_ones_fail), plan)
        tolerant = replace(plan, max_failure_rate=0.9)
        result = await off_policy(trainer, TASKS, single_turn(odd_ones_fail), tolerant)
    assert result.version == PLAN.steps


@pytest.mark.anyio
async def test_a_gap_stops_the_run(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        plan = replace(PLAN, max_logprob_gap=1e-30)
        with pytest.raises(LogprobGapError, match="same weights"):
            await on_policy(trainer, TASKS, single_turn(vowels), plan)
        result = await on_policy(
            trainer, TASKS, single_turn(vowels), replace(plan, max_logprob_gap=None)
        )
    assert result.metrics["gap/max"] > 0


@pytest.mark.anyio
async def test_bad_input(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        environment = single_turn(vowels)
        with pytest.raises(InvalidRequestError, match="no tasks"):
            await on_policy(trainer, [], environment, PLAN)
        with pytest.raises(InvalidRequestError, match="'prompt'"):
            await on_policy(trainer, [{"question": "x"}], environment, PLAN)
        with pytest.raises(ConfigError, match="off_policy"):
            stale = replace(PLAN, max_staleness=1, objective=RATIO)
            await on_policy(trainer, TASKS, environment, stale)
        with pytest.raises(ConfigError, match="reference"):
            await on_policy(
                trainer, TASKS, environment, replace(PLAN, objective=Objective(kl_loss=0.1))
            )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("group_size", 0),
        ("minibatches", 0),
        ("max_failure_rate", -0.1),
        ("zero_variance", "maybe"),
        ("advantage", "grpo2"),
        ("objective", "reinforce"),
        ("max_staleness", 3),
    ],
)
def test_bad_plans(field: str, value: object) -> None:
    with pytest.raises(ConfigError):
        replace(PLAN, **{field: value})  # type: ignore[arg-type]


def test_a_plan_as_config() -> None:
    config = replace(PLAN, learning_rate=lambda step: 0.1, adam=AdamParams(beta1=0.5)).as_config()
    assert config["learning_rate"] == ["<lambda>", 0.1, 0.1]
    assert config["objective"]["loss_fn"] == "importance_sampling"
