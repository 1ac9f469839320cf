"""The supervised and the rejection loop on the fake engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rl.fake import fake_service, vowels
from tests.rl.helpers import rollout, segment
from tests.rl.test_loops import Memory, weights, without_times
from weaver.errors import ConfigError, InvalidRequestError
from weaver.types import SamplingParams
from weaver_rl.algorithms.policy import filtered
from weaver_rl.algorithms.rejection import Keep, rejection, select
from weaver_rl.algorithms.run import Run
from weaver_rl.algorithms.supervised import SupervisedPlan, batches, supervised, to_datums
from weaver_rl.loggers import Loggers
from weaver_rl.plan import Plan
from weaver_rl.rollouts import single_turn
from weaver_rl.run_folder import open_run_folder
from weaver_rl.types import Group

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = [{"prompt": f"{i}=", "completion": "abc"[: 1 + i % 3]} for i in range(12)]
PLAN = SupervisedPlan(epochs=4, batch_tokens=20, learning_rate=0.1, seed=3)
TASKS = [{"prompt": f"{i}="} for i in range(10)]
RL_PLAN = Plan(
    steps=8,
    groups_per_step=4,
    group_size=6,
    learning_rate=0.4,
    sampling=SamplingParams(max_tokens=6),
    minibatches=2,
)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 5))
def test_batches_keep_to_the_budget(lengths: list[int], epoch: int) -> None:
    made = batches(lengths, 32, seed=1, epoch=epoch)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= 32 for batch in made)
    assert made == batches(lengths, 32, seed=1, epoch=epoch)


def test_a_long_example_is_a_batch_of_its_own() -> None:
    assert [0] in batches([99, 1, 1], 10, seed=0, epoch=0)


async def tuned(
    home: Path, plan: SupervisedPlan, *, folder: Path | None = None, resume: bool = False
) -> tuple[list[float | None], dict[int, dict[str, float]], dict[str, float]]:
    memory = Memory()
    opened = (
        open_run_folder(folder, plan.as_config(), resume=resume, may_differ=["epochs"])
        if folder
        else None
    )
    async with fake_service(home) as service:
        trainer = await service.create_model(base_model="fake")
        result = await supervised(
            trainer,
            EXAMPLES,
            plan,
            held_out=EXAMPLES[:3],
            run=Run(folder=opened, loggers=Loggers(memory), checkpoint_every=3),
        )
        return await weights(trainer), memory.rows, dict(result.metrics)


@pytest.mark.anyio
async def test_supervised_learns_and_evaluates(tmp_path: Path) -> None:
    _, rows, last = await tuned(tmp_path, replace(PLAN, epochs=20, evaluate_every=5))
    first = rows.pop(0)
    assert sorted(rows) == list(range(1, len(rows) + 1))
    assert rows[len(rows)]["train/loss"] < 0.5 * rows[1]["train/loss"]
    assert rows[5]["eval/loss"] < first["eval/loss"]
    assert last["eval/loss"] == rows[len(rows)]["eval/loss"] < 0.5 * rows[5]["eval/loss"]
    assert [row["train/step"] for row in rows.values()] == list(rows)


@pytest.mark.anyio
async def test_evaluation_and_checkpoints_change_nothing(tmp_path: Path) -> None:
    plain, rows, _ = await tuned(tmp_path / "1", PLAN)
    watched, seen, _ = await tuned(
        tmp_path / "2", replace(PLAN, evaluate_every=2), folder=tmp_path / "run"
    )
    assert watched == plain
    losses = [[row.get("train/loss") for row in one.values()] for one in (rows, seen)]
    assert losses[0] == losses[1][1:]


@pytest.mark.anyio
async def test_supervised_resumes_exactly(tmp_path: Path) -> None:
    whole, rows, _ = await tuned(tmp_path / "1", PLAN)
    await tuned(tmp_path / "2", replace(PLAN, epochs=2), folder=tmp_path / "run")
    resumed, rest, _ = await tuned(tmp_path / "2", PLAN, folder=tmp_path / "run", resume=True)
    assert 0 < len(rest) < len(rows)
    assert resumed == whole
    assert without_times(rest) == {k: v for k, v in without_times(rows).items() if k in rest}


@pytest.mark.anyio
async def test_bad_examples_are_named(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        with pytest.raises(InvalidRequestError, match=r"examples: there are no"):
            await supervised(trainer, [], PLAN)
        with pytest.raises(InvalidRequestError, match=r"held_out\[1\]"):
            await supervised(trainer, EXAMPLES, PLAN, held_out=[EXAMPLES[0], {"x": 1}])
    with pytest.raises(ConfigError, match="epochs"):
        SupervisedPlan(epochs=0)


@pytest.mark.anyio
async def test_long_examples_are_refused_cut_or_dropped(tmp_path: Path) -> None:
    plan = replace(PLAN, max_length=6)  # tokens; the prompt has two or three, the end one
    examples = [*EXAMPLES[:3], {"prompt": "9=", "completion": "abcdef"}, {"text": "abcdefgh"}]
    silent = {"prompt": "123456789", "completion": "a"}  # all that is learned is cut off
    memory = Memory()
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        whole = (await to_datums(trainer, examples, PLAN)).datums
        with pytest.raises(InvalidRequestError, match=r"examples\[3\]: has 9 tokens, more than 6"):
            await to_datums(trainer, examples, plan)
        cut = await to_datums(trainer, [*examples, silent], replace(plan, too_long="cut"))
        assert (cut.cut, cut.dropped) == (2, 1)
        for kept, given in zip(cut.datums, whole, strict=True):
            assert kept.model_input.to_ints() == given.model_input.to_ints()[:5]
            for name, data in kept.loss_fn_inputs.items():
                assert data.tolist() == given.loss_fn_inputs[name].tolist()[:5]
        drop = replace(plan, too_long="drop")
        dropped = await to_datums(trainer, [*examples, silent], drop)
        assert (dropped.cut, dropped.dropped, dropped.datums) == (0, 3, whole[:3])
        with pytest.raises(InvalidRequestError, match="held_out: are all longer than 6 tokens"):
            await supervised(trainer, examples, drop, held_out=[silent])
        context = trainer.model_info.context_length
        long = {"text": "a" * (context + 2)}
        kept = (await to_datums(trainer, [long], replace(PLAN, too_long="cut"))).datums[0]
        assert kept.model_input.length == context
        await supervised(trainer, [*examples, silent], drop, run=Run(loggers=Loggers(memory)))
    assert memory.rows[max(memory.rows)]["data/dropped"] == 3
    for wrong in ({"too_long": "skip"}, {"max_length": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(PLAN, **wrong)


def test_select() -> None:
    same = segment([1], [2, 3])
    one = Group(
        task={},
        rollouts=(
            rollout(0.5, segment([1], [4])),
            rollout(1.0, same),
            rollout(1.0, same),
            rollout(0.0, segment([1], [5])),
            rollout(None),
            rollout(0.9, segment([1], [6])),
        ),
    )
    found = filtered([one, Group(task={}, rollouts=(rollout(0.1),))])

    def kept(keep: Keep) -> list[float]:
        return [r.reward for g in select(found, keep).kept for r in g.rollouts]

    assert kept(Keep(threshold=0.5)) == [1.0, 0.9, 0.5]
    assert kept(Keep(threshold=0.5, unique=False)) == [1.0, 1.0, 0.9, 0.5]
    assert kept(Keep(top_k=1)) == [1.0, 0.1]
    assert kept(Keep(threshold=2.0)) == []
    got = select(found, Keep(threshold=0.5))
    assert got.metrics == {
        "rejection/kept": 3,
        "rejection/accept_rate": 0.5,
        "rejection/duplicates": 1,
        "rejection/tasks_kept": 0.5,
        "rejection/reward_kept": pytest.approx(0.8),
    }
    count = sum(len(g.rollouts) for g in (*got.kept, *got.dropped))
    assert count == 7
    with pytest.raises(ConfigError, match="top_k"):
        Keep(top_k=0)


async def rejected(
    home: Path, plan: Plan, *, folder: Path | None = None, resume: bool = False
) -> tuple[list[float | None], dict[int, dict[str, float]]]:
    memory = Memory()
    opened = None
    if folder is not None:
        opened = open_run_folder(folder, plan.as_config(), resume=resume, may_differ=["steps"])
    async with fake_service(home) as service:
        trainer = await service.create_model(base_model="fake")
        await rejection(
            trainer,
            TASKS,
            single_turn(vowels),
            plan,
            keep=Keep(top_k=2),
            run=Run(folder=opened, loggers=Loggers(memory), checkpoint_every=3),
        )
        return await weights(trainer), memory.rows


@pytest.mark.anyio
async def test_rejection_learns_and_resumes_exactly(tmp_path: Path) -> None:
    whole, rows = await rejected(tmp_path / "1", RL_PLAN)
    assert rows[8]["reward/mean"] > rows[1]["reward/mean"] + 0.15
    assert all(row["rejection/accept_rate"] == pytest.approx(1 / 3) for row in rows.values())
    assert all(row["gap/max"] < 1e-4 for row in rows.values())
    assert all(0 < row["off_policy/ess"] <= 1 for row in rows.values())
    await rejected(tmp_path / "2", replace(RL_PLAN, steps=5), folder=tmp_path / "run")
    resumed, rest = await rejected(tmp_path / "2", RL_PLAN, folder=tmp_path / "run", resume=True)
    assert sorted(rest) == [6, 7, 8]
    assert resumed == whole
