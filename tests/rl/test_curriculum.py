"""Curricula: what they choose, that a run that goes on chooses the same, and bad ones by name."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.rl.fake import fake_service, vowels
from tests.rl.helpers import group
from tests.rl.test_loops import PLAN, RATIO, Memory, weights, without_times
from weaver.errors import ConfigError, InvalidRequestError
from weaver_rl.algorithms.policy import off_policy, on_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.curriculum import (
    Picker,
    Progress,
    by_pass_rate,
    joined,
    mixing,
    outcomes,
    shuffled,
)
from weaver_rl.loggers import Loggers
from weaver_rl.rollouts import single_turn
from weaver_rl.run_folder import open_run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver_rl.types import Reply, Task

EASY, HARD = ([{"prompt": f"{i}{sign}"} for i in range(n)] for sign, n in (("=", 3), ("+", 7)))
TASKS = joined({"easy": EASY, "hard": HARD})
RNG = np.random.default_rng


def test_shuffled_takes_each_once_before_any_comes_again() -> None:
    progress = Progress.fresh(TASKS)
    for step in range(6):
        chosen = shuffled()(progress, 4, RNG(step))
        np.add.at(progress.taken, np.asarray(chosen), 1)
        assert np.ptp(progress.taken) <= 1
    assert Counter(np.asarray(shuffled()(progress, 25, RNG(0))).tolist()).most_common(1)[0][1] <= 4


def test_the_frontier_is_where_half_of_the_replies_pass() -> None:
    tasks = [{}] * 4
    played, passed = np.full(4, 8), np.array([0, 4, 8, 7])
    progress = Progress(tasks, np.ones(4, dtype=np.int64), played, passed)
    drawn: Counter[int] = Counter()
    choose = by_pass_rate(explore=0.2)
    for seed in range(4000):
        drawn.update(np.asarray(choose(progress, 1, RNG(seed))).tolist())
    p = (passed + 1) / (played + 2)
    want = 0.8 * p * (1 - p) / (p * (1 - p)).sum() + 0.2 / 4
    np.testing.assert_allclose([drawn[i] / 4000 for i in range(4)], want, atol=0.025)
    everything = np.asarray(choose(progress, 6, RNG(0)))
    assert set(everything[:4].tolist()) == {0, 1, 2, 3}  # nothing twice while there are others


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_mixture_has_its_shares_exactly(count: int) -> None:
    choose = mixing({"easy": 1, "hard": 3})
    progress = Progress.fresh(TASKS)
    for step in range(1, 13):
        chosen = np.asarray(choose(progress, count, RNG(step)))
        np.add.at(progress.taken, chosen, 1)
        hard = int(progress.taken[3:].sum())
        assert abs(hard - 0.75 * step * count) <= 1
    assert np.ptp(progress.taken[:3]) <= 1 >= np.ptp(progress.taken[3:])


def test_a_weight_of_0_leaves_a_data_set_out() -> None:
    chosen = np.asarray(mixing({"easy": 0, "hard": 1})(Progress.fresh(TASKS), 20, RNG(0)))
    assert chosen.min() >= 3


def test_curricula_go_together() -> None:
    progress = Progress.fresh(TASKS)
    progress.played[:] = 8
    progress.passed[:] = [8, 4, 8, *[0] * 6, 4]
    choose = mixing({"easy": 1, "hard": 1}, within=by_pass_rate(explore=0.0))
    drawn: Counter[int] = Counter()
    for seed in range(300):
        drawn.update(np.asarray(choose(progress, 2, RNG(seed))).tolist())
    assert sum(drawn[i] for i in range(3)) == 300
    assert drawn[1] > drawn[0] + drawn[2] - 60
    assert drawn[9] > max(drawn[i] for i in range(3, 9)) * 2
    assert choose.__name__ == "mixing(easy=1, hard=1, within=by_pass_rate(explore=0))"


def test_what_came_of_groups() -> None:
    assert outcomes([4, 2], [group(1.0, 0.5, None), group(None)]) == ((4, 2, 1), (2, 0, 0))


def test_the_state_goes_through_json_and_counts_every_round() -> None:
    def picker(state: Mapping[str, Any]) -> Picker:
        return Picker(TASKS, shuffled(), seed=3, count=4, state=state)

    first = picker({})
    for step in range(3):
        picked, tasks = first.begin(step)
        more = first.more(picked, 2, step=step, number=1, seed=0)
        assert len({t["prompt"] for t in [*tasks, *more]}) == 6
        first.learn([(i, 8, 2) for i in picked.indices])
    again = picker(first.state())
    assert again.state() == first.state()
    assert sum(row[0] for row in first.state().values()) == 18
    assert again.begin(3)[1] == first.begin(3)[1]


def some(task: Task, reply: Reply) -> float:
    """Passes where the reply has many vowels; hard tasks seldom do."""
    return float(vowels(task, reply) > (0.6 if task["dataset"] == "hard" else 0.2))


CURRICULUM = mixing({"easy": 1, "hard": 1}, within=by_pass_rate())
VARIANTS: dict[str, dict[str, Any]] = {
    "in_step": {},
    "ahead": {"max_staleness": 2, "objective": RATIO},
    "resample": {"zero_variance": "resample", "resample_rounds": 3},
    "both": {"max_staleness": 2, "objective": RATIO, "zero_variance": "resample"},
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", VARIANTS)
async def test_a_run_that_goes_on_chooses_what_it_would_have(name: str, tmp_path: Path) -> None:
    plan = replace(PLAN, curriculum=CURRICULUM, **VARIANTS[name])

    class Killed(Exception):
        pass

    class Bomb(Run):
        async def log(self, metrics: Mapping[str, float], *, step: int) -> None:
            if step > 3:
                raise Killed

    async def run(home: Path, one: Run) -> tuple[Any, dict[int, dict[str, float]]]:
        memory = Memory()
        one.loggers = Loggers(memory)
        async with fake_service(home) as service:
            trainer = await service.create_model(base_model="fake")
            await off_policy(trainer, TASKS, single_turn(some), plan, run=one)
            return await weights(trainer), memory.rows

    whole, rows = await run(tmp_path / "1", Run())
    folder = open_run_folder(tmp_path / "run", plan.as_config())
    with pytest.raises(Killed):
        await run(tmp_path / "2", Bomb(folder=folder, checkpoint_every=2))
    got, rest = await run(tmp_path / "2", Run(folder=folder, checkpoint_every=2))
    assert got == whole
    assert without_times(rest) == {k: v for k, v in without_times(rows).items() if k in rest}
    assert sorted(rest) == [3, 4, 5, 6]
    assert rows[6]["tokens/total"] == sum(row["tokens/sampled"] for row in rows.values())
    if name == "in_step":
        assert [row["dataset/hard/rollouts"] for row in rows.values()] == [8] * 6
    if "resample" in plan.zero_variance:
        assert max(row["groups/rounds"] for row in rows.values()) > 1


def short(progress: Progress, count: int, rng: np.random.Generator) -> list[int]:
    return [0] * (count - 1)


def beyond(progress: Progress, count: int, rng: np.random.Generator) -> list[int]:
    return [len(progress.tasks)] * count


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("curriculum", "error", "words"),
    [
        (mixing({"easy": 1}), ConfigError, r"tasks\[3\].dataset.*'hard'"),
        (mixing({"easy": 1, "hard": 1, "none": 1}), ConfigError, "weights.none"),
        (short, InvalidRequestError, "short gave .* 4 indices from 0 to 9"),
        (beyond, InvalidRequestError, "beyond gave"),
        (lambda *given: "abcd", InvalidRequestError, "<lambda> gave abcd"),
        (mixing({"easy": 1, "hard": 1}, within=beyond), InvalidRequestError, "beyond gave"),
    ],
)
async def test_a_curriculum_that_does_not_fit_plays_nothing(
    curriculum: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        begin = time.monotonic()
        with pytest.raises(error, match=words):
            plan = replace(PLAN, curriculum=curriculum)
            await on_policy(trainer, TASKS, single_turn(some), plan)
        assert time.monotonic() - begin < 1
        assert (await trainer.get_info()).step == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: mixing({}),
        lambda: mixing({"a": -1.0}),
        lambda: mixing({"a": 0.0}),
        lambda: by_pass_rate(explore=2.0),
        lambda: replace(PLAN, curriculum="hard"),  # type: ignore[arg-type]
        lambda: replace(PLAN, resample_rounds=0),
    ],
)
def test_bad_curricula_are_named_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        wrong()


def test_a_task_of_another_data_set() -> None:
    with pytest.raises(InvalidRequestError, match=r"easy\[1\].dataset"):
        joined({"easy": [{"prompt": "a"}, {"prompt": "b", "dataset": "hard"}]})
