"""Credit: each against an independent form, the gradient of the KL, and bad marks by name."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest

from tests.rl.fake import fake_service, vowels
from tests.rl.helpers import FAILURE, group, rollout, segment
from tests.rl.test_loops import PLAN, TASKS, trained
from weaver.errors import ConfigError, InvalidRequestError
from weaver_rl import credit
from weaver_rl.algorithms.policy import on_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.credit.marks import Marks, check_marks, spread
from weaver_rl.credit.models import check_vocabulary
from weaver_rl.rollouts import single_turn
from weaver_rl.run_folder import open_run_folder
from weaver_rl.transcripts import read_transcripts
from weaver_rl.types import Group, Rollout, Segment, Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weaver_rl.agent import Agent
    from weaver_rl.types import Task

GROUPS = [group(1.0, 0.0, None, 0.5), group(0.25, 0.25), group(3.0)]


def made(one: credit_type, groups: Sequence[Group]) -> list[list[Marks]]:
    return anyio.run(one, groups)


credit_type = Any


def played(rewards: Sequence[float], lengths: Sequence[int], *, failed: bool = False) -> Rollout:
    """A rollout of turns with these rewards and sampled lengths, all in one segment."""
    mask = [bit for length in lengths for bit in (0, *(1,) * length)]
    count = len(mask)
    whole = Segment(
        tokens=tuple(range(count)),
        mask=tuple(mask),
        logprobs=tuple(-0.1 * i * m for i, m in enumerate(mask)),
        sampling_logprobs=(0.0,) * count,
        versions=tuple(m - 1 for m in mask),
    )
    return Rollout(
        task={},
        trajectory=Trajectory(
            segments=(whole,),
            turns=len(lengths),
            reply_lengths=tuple(lengths),
            turn_rewards=tuple(rewards),
        ),
        failure=FAILURE if failed else None,
    )


class Scores:
    """A model that gives every token the log-probability of its place in a table, by tokens."""

    base_model = "table"

    def __init__(self, table: Any) -> None:
        self.table = table

    async def compute_logprobs(self, prompt: Any) -> list[float | None]:
        return [None, *self.table(prompt.to_ints())]


@pytest.mark.parametrize("name", ["group_centred", "standardised", "leave_one_out", "raw"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_outcome_against_plain_loops(name: str, ddof: int) -> None:
    if ddof and name != "standardised":
        return
    marks = made(credit.outcome(name, ddof=ddof), GROUPS)  # type: ignore[arg-type]
    for group_, row in zip(GROUPS, marks, strict=True):
        r = list(group_.rewards)
        for one, mark in zip(group_.rollouts, row, strict=True):
            if one.failure is not None:
                assert not mark.weights.any()
                continue
            others = list(r)
            others.remove(one.reward)
            want = {
                "raw": one.reward,
                "group_centred": one.reward - np.mean(r),
                "leave_one_out": one.reward - np.mean(others) if others else 0.0,
                "standardised": (one.reward - np.mean(r)) / (np.std(r, ddof=ddof) + 1e-6)
                if len(r) > 1
                else 0.0,
            }[name]
            np.testing.assert_allclose(mark.advantages, [want] * 2, atol=1e-12)
            assert mark.weights.tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["group_centred", "raw"])
def test_turns_against_plain_loops(seed: int, discount: float, name: str) -> None:
    """Of up to four turns, each of up to three tokens, in groups of one to four."""
    rng = np.random.default_rng(seed)
    given = [
        [
            [(float(rng.normal()), int(rng.integers(0, 4))) for _ in range(rng.integers(1, 5))]
            for _ in range(rng.integers(1, 5))
        ]
        for _ in range(3)
    ]
    groups = [
        Group(
            task={},
            rollouts=tuple(played([r for r, _ in one], [n for _, n in one]) for one in rollouts),
        )
        for rollouts in given
    ]
    marks = made(credit.turns(name, discount=discount), groups)
    for rollouts, row in zip(given, marks, strict=True):
        returns = [
            [
                sum(discount ** (s - t) * one[s][0] for s in range(t, len(one)))
                for t in range(len(one))
            ]
            for one in rollouts
        ]
        for one, own, mark in zip(rollouts, returns, row, strict=True):
            want: list[float] = []
            for t, (_, length) in enumerate(one):
                there = [other[t] for other in returns if len(other) > t]
                base = float(np.mean(there)) if name == "group_centred" else 0.0
                want += [own[t] - base] * length
            np.testing.assert_allclose(mark.advantages, want, atol=1e-9)


def test_a_failed_rollout_is_no_baseline_of_turns() -> None:
    whole = Group(task={}, rollouts=(played([1.0], [1]), played([9.0], [1], failed=True)))
    (row,) = made(credit.turns(), [whole])
    assert (row[0].advantages.tolist(), row[1].weights.tolist()) == ([0.0], [0.0])


def test_steps_are_turns_with_the_rewards_of_a_function() -> None:
    whole = [Group(task={"prompt": "x"}, rollouts=(played([], [1, 2]), played([], [2, 1, 1])))]
    values = {2: [1.0, 0.0], 3: [0.5, 0.25, -1.0]}

    async def score(task: Task, rollout: Rollout) -> list[float]:
        assert task == rollout.task
        return values[rollout.trajectory.turns]

    told = [replace(one, trajectory=replace(one.trajectory, turn_rewards=tuple(values[len(n)])))
            for one, n in zip(whole[0].rollouts, ([1, 2], [2, 1, 1]), strict=True)]  # fmt: skip
    want = made(credit.turns("raw", discount=0.5), [Group(task={}, rollouts=tuple(told))])
    got = made(credit.steps(score, "raw", discount=0.5), whole)
    for one, other in zip(got[0], want[0], strict=True):
        np.testing.assert_array_equal(one.advantages, other.advantages)


@pytest.mark.parametrize(("beta", "seed"), [(0.5, 0), (2.0, 1)])
def test_the_gradient_of_kl_is_that_of_the_kl_of_whole_rollouts(beta: float, seed: int) -> None:
    """−β·E[Σ(log π − log π_ref)] of two tokens in two segments, summed exactly, by differences."""
    rng = np.random.default_rng(seed)
    theta, ref = rng.normal(size=(2, 4, 3))  # row 0: the first token; row 1 + a: behind a

    def logs(of: np.ndarray) -> np.ndarray:
        return np.asarray(of - np.log(np.exp(of).sum(1, keepdims=True)))

    def value(of: np.ndarray) -> float:
        p, r = logs(of), logs(ref)
        pairs = list(product(range(3), repeat=2))
        both = [(p[0, a] + p[1 + a, b], r[0, a] + r[1 + a, b]) for a, b in pairs]
        return float(-beta * sum(np.exp(lp) * (lp - lr) for lp, lr in both))

    p, r = logs(theta), logs(ref)
    reference = Scores(lambda t: [r[0, t[1]]] if len(t) == 2 else [r[0, t[1]], r[1 + t[1], t[2]]])
    found, right, alone = np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    for a, b in product(range(3), repeat=2):
        first = Segment(tokens=(0, a), mask=(0, 1), logprobs=(0, p[0, a]),
                        sampling_logprobs=(0, 0), versions=(-1, 0))  # fmt: skip
        second = Segment(tokens=(0, a, b), mask=(0, 0, 1), logprobs=(0, 0, p[1 + a, b]),
                         sampling_logprobs=(0, 0, 0), versions=(-1, -1, 0))  # fmt: skip
        whole = [Group(task={}, rollouts=(rollout(0.0, first, second),))]
        chance = np.exp(p[0, a] + p[1 + a, b])
        for into, discount in ((found, 1.0), (alone, 0.0)):
            ((mark,),) = made(credit.kl(reference, beta=beta, discount=discount), whole)  # type: ignore[arg-type]
            for row, token, A in zip((0, 1 + a), (a, b), mark.advantages, strict=True):
                into[row] += chance * A * (np.eye(3)[token] - np.exp(p[row]))
            kl = mark.measured["kl/reference"]
            np.testing.assert_allclose(kl, [p[0, a] - r[0, a], p[1 + a, b] - r[1 + a, b]])
    for place in np.ndindex(4, 3):
        step = np.zeros((4, 3))
        step[place] = 1e-5
        right[place] = (value(theta + step) - value(theta - step)) / 2e-5
    np.testing.assert_allclose(found, right, atol=1e-8)
    assert np.abs(alone - right).max() > 1e-3  # what `kl_loss` has


def test_distil_is_the_reverse_kl_of_each_token() -> None:
    one = rollout(1.0, segment([1, 2], [3, 4], logprob=-0.5), segment([1], [5], logprob=-2.0))
    teacher = Scores(lambda tokens: [-1.0] * (len(tokens) - 1))
    whole = [Group(task={}, rollouts=(one, rollout(None)))]
    ((mark, failed),) = made(credit.distil(teacher), whole)  # type: ignore[arg-type]
    np.testing.assert_allclose(mark.advantages, [-0.5, -0.49, 1.0])
    np.testing.assert_allclose(mark.measured["kl/teacher"], [0.5, 0.49, -1.0])
    assert not failed.weights.any()


def test_total_adds_and_keeps_the_parts() -> None:
    tripled = credit.unless(lambda rollout: rollout.reward > 0.9, credit.outcome("raw"))
    both = credit.total(credit.outcome(), credit.outcome("raw"), tripled)
    assert both.__name__.startswith("total(outcome(group_centred), outcome(raw), unless(<lambda>")
    marks = made(both, GROUPS)
    full, part = marks[0][0], marks[0][3]
    np.testing.assert_allclose(full.advantages, [0.5 + 1.0] * 2)  # the third counts nothing there
    np.testing.assert_allclose(part.advantages, [0.0 + 0.5 + 0.5] * 2)
    assert list(part.parts) == ["outcome", "outcome_2", "unless"]
    np.testing.assert_allclose(part.parts["unless"], [0.5, 0.5])


@pytest.mark.parametrize(
    "parts", [[(1.5, 1.0)], [(1.0, 0.5), (-2.0, 2.0)], [(1.0, 0.0), (3.0, 1.0)], [(1.0, 0.0)]]
)
def test_a_total_pulls_as_its_parts_together(parts: list[tuple[float, float]]) -> None:
    def part(advantage: float, weight: float) -> Any:
        async def flat(groups: Sequence[Group]) -> list[list[Marks]]:
            return [[Marks([advantage] * 2, [weight] * 2)]]  # type: ignore[arg-type]

        return flat

    ((mark,),) = made(credit.total(*(part(*one) for one in parts)), [group(1.0)])
    want = sum(weight * advantage for advantage, weight in parts)
    np.testing.assert_allclose(mark.weights * mark.advantages, [want] * 2, atol=1e-9)


def test_unless_keeps_the_baseline() -> None:
    cut = group(1.0, 0.0)
    trajectory = replace(cut.rollouts[1].trajectory, stop_reason="length")
    cut = replace(cut, rollouts=(cut.rollouts[0], replace(cut.rollouts[1], trajectory=trajectory)))
    ((kept, left_out),) = made(credit.unless(credit.truncated, credit.outcome()), [cut])
    assert kept.advantages.tolist() == [0.5, 0.5]
    assert (kept.weights.tolist(), left_out.weights.tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize("over", ["batch", "group"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_is_reinforce_pp_with_the_kl_in_the_reward(over: Any, ddof: Any) -> None:
    rng = np.random.default_rng(0)
    reference = Scores(lambda tokens: [float(-len(tokens) - tokens[-1])] * (len(tokens) - 1))
    groups = [
        Group(task={}, rollouts=tuple(
            rollout(float(rng.normal()), segment([1], rng.integers(0, 9, size=n).tolist()))
            for n in (1, 4, 2)
        ))
        for _ in range(2)
    ]  # fmt: skip
    both = credit.total(credit.outcome("raw"), credit.kl(reference, beta=0.1))  # type: ignore[arg-type]
    marks = made(credit.whitened(both, over=over, ddof=ddof), groups)
    values = []
    for group_ in groups:
        rows = []
        for one in group_.rollouts:
            (s,) = one.trajectory.segments
            there = float(-len(s.tokens) - s.tokens[-1])
            penalties = [0.1 * (lp - there) for lp in s.logprobs[1:]]
            rows += [one.reward - sum(penalties[t:]) for t in range(len(penalties))]
        values.append(np.array(rows))
    if over == "batch":
        flat = np.concatenate(values)
        want = [(one - flat.mean()) / flat.std(ddof=ddof) for one in values]
    else:
        want = [(one - one.mean()) / one.std(ddof=ddof) for one in values]
    for row, right in zip(marks, want, strict=True):
        got = np.concatenate([one.advantages for one in row])
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)


GOOD = Marks(np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        (None, "mine", "is a NoneType"),
        ([[GOOD]], "mine", "is a list of 1, there are 2"),
        ([[GOOD, GOOD], [GOOD]], "mine[1]", "there are 2"),
        ([[GOOD, 1.0], [GOOD] * 2], "mine[0][1]", "is a float"),
        ([[GOOD, GOOD], [GOOD, Marks(np.ones(3), np.ones(2))]], "mine[1][1].advantages", "[3]"),
        ([[Marks(np.array([1, np.nan]), np.ones(2)), GOOD], [GOOD] * 2],
         "mine[0][0].advantages[1]", "is nan"),
        ([[GOOD, Marks(np.ones(2), np.array([np.inf, 1]))], [GOOD] * 2],
         "mine[0][1].weights[0]", "is inf"),
        ([[GOOD, Marks(np.ones(2), np.array([1, -1]))], [GOOD] * 2],
         "mine[0][1].weights[1]", "at least 0"),
        ([[GOOD, Marks(["a", "b"], np.ones(2))], [GOOD] * 2],  # type: ignore[arg-type]
         "mine[0][1].advantages", "no number"),
        ([[GOOD, Marks(np.ones(2), np.ones(2), {"x": np.ones(1)})], [GOOD] * 2],
         "mine[0][1].x", "[1]"),
    ],
)  # fmt: skip
@pytest.mark.anyio
async def test_marks_that_do_not_fit_train_nothing(
    given: Any, field: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check_marks(given, [group(1.0, 0.0)] * 2, source="mine")
    assert raised.value.field == field
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, r"\.advantages\[0\].*nan"), (None, r"\.advantages: .*\[1\]")]
)
@pytest.mark.anyio
async def test_a_bad_credit_ends_the_run_before_anything_is_trained(
    value: float | None, says: str, tmp_path: Path
) -> None:
    """A number that is none, or of a rollout fewer than it has tokens."""

    async def mine(groups: Sequence[Group]) -> list[list[Marks]]:
        marks = spread(groups, np.ones((len(groups), PLAN.group_size)))
        if value is None:
            marks[1][2] = Marks(np.ones(1), marks[1][2].weights)
        else:
            marks[1][2].advantages[0] = value
        return marks

    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        await trainer.get_tokenizer()  # loads transformers, the first time
        begin = time.monotonic()
        with pytest.raises(InvalidRequestError, match=r"mine\[1\]\[2\]" + says):
            await on_policy(trainer, TASKS, single_turn(vowels), replace(PLAN, credit=mine))
        assert time.monotonic() - begin < 1
        assert (await trainer.get_info()).step == 0


@pytest.mark.anyio
async def test_the_rewards_of_turns_reach_the_tokens_and_the_transcripts(tmp_path: Path) -> None:
    async def two_turns(agent: Agent, task: Task) -> float:
        first = await agent.chat(task["prompt"])
        agent.reward(vowels(task, first) / 2)
        agent.reward(vowels(task, first) / 2, turn=0)
        second = await agent.chat("again")
        agent.reward(vowels(task, second))
        return 0.0

    plan = replace(PLAN, steps=8, credit=credit.total(credit.turns(), credit.outcome()))
    folder = open_run_folder(tmp_path / "run", plan.as_config())
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        result = await on_policy(trainer, TASKS, two_turns, plan, run=Run(folder=folder))
    assert result.metrics["credit/turns/mean_abs"] > 0
    assert result.metrics["credit/outcome/mean_abs"] == 0
    rows = read_transcripts(folder.transcripts, 8)
    first = [s["credit"]["turns"] for row in rows for s in row["segments"]]
    assert all(len(one) == len(s["tokens"]) for one, s in zip(
        first, (s for row in rows for s in row["segments"]), strict=True))  # fmt: skip


@pytest.mark.parametrize(("turn", "value"), [(0, 1.0), (2, 1.0), (-3, 1.0), (1, float("nan"))])
@pytest.mark.anyio
async def test_a_turn_that_does_not_exist(turn: int, value: float, tmp_path: Path) -> None:
    async def environment(agent: Agent, task: Task) -> float:
        if turn == 0:
            agent.reward(value, turn=turn)
        for _ in range(2):
            await agent.chat("a")
        agent.reward(value, turn=turn)
        return 0.0

    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        await trainer.get_tokenizer()  # loads transformers, the first time
        begin = time.monotonic()
        with pytest.raises(InvalidRequestError, match="value" if turn == 1 else "turn"):
            await on_policy(trainer, TASKS, environment, PLAN)
        assert time.monotonic() - begin < 1
        assert (await trainer.get_info()).step == 0


@pytest.mark.parametrize(
    ("values", "words"), [([1.0], r"2 turns"), ([1.0, float("nan")], r"\[1\].*nan"), ("ab", "ab")]
)
def test_a_process_reward_that_does_not_fit_the_turns(values: Any, words: str) -> None:
    async def score(task: Task, rollout: Rollout) -> Any:
        return values

    whole = [Group(task={}, rollouts=(played([], [1, 1]),))]
    with pytest.raises(InvalidRequestError, match=words):
        made(credit.steps(score), whole)


def test_a_process_reward_that_hangs() -> None:
    async def score(task: Task, rollout: Rollout) -> list[float]:
        await anyio.sleep_forever()
        return []

    with pytest.raises(InvalidRequestError, match=r"score\[0\]\[0\].*0.05 s"):
        made(credit.steps(score, timeout_s=0.05), [Group(task={}, rollouts=(played([], [1]),))])


def test_turns_need_their_lengths() -> None:
    whole = Group(task={}, rollouts=(rollout(1.0),))
    trajectory = replace(whole.rollouts[0].trajectory, turns=2)
    torn = replace(whole, rollouts=(replace(whole.rollouts[0], trajectory=trajectory),))
    with pytest.raises(InvalidRequestError, match="reply_lengths"):
        made(credit.turns(), [torn])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: credit.outcome("grpo2"),
        lambda: credit.outcome("raw", ddof=1),
        lambda: credit.turns(discount=1.5),
        lambda: credit.steps(lambda task, rollout: [1.0]),  # type: ignore[arg-type,return-value]
        lambda: credit.kl(Scores(None), beta=-1.0),  # type: ignore[arg-type]
        lambda: credit.kl("base", beta=0.1),  # type: ignore[arg-type]
        lambda: credit.total(),
        lambda: credit.total(credit.outcome),  # type: ignore[arg-type]
        lambda: credit.unless(True, credit.outcome()),  # type: ignore[arg-type]
        lambda: credit.whitened(credit.outcome(), over="step"),  # type: ignore[arg-type]
        lambda: replace(PLAN, credit=credit.outcome(), advantage="raw"),
        lambda: replace(PLAN, credit="outcome"),  # type: ignore[arg-type]
    ],
)
def test_bad_credits_are_named_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        wrong()


def test_an_advantage_of_another_shape() -> None:
    mine = credit.outcome(lambda rewards, valid: rewards[0])
    with pytest.raises(InvalidRequestError, match=r"<lambda> gave the shape \[4\]"):
        made(mine, GROUPS)


@pytest.mark.anyio
async def test_a_teacher_with_another_vocabulary() -> None:
    def tokenizer(*words: str) -> Any:
        return SimpleNamespace(get_vocab=lambda: {word: i for i, word in enumerate(words)})

    async def other() -> Any:
        return tokenizer("a", "c", "b")

    async def longer() -> Any:
        return tokenizer("a", "b", "c", "d")

    teacher: Any = SimpleNamespace(base_model="big", get_tokenizer=other)
    with pytest.raises(ConfigError, match="big has another vocabulary: token 1 is 'c' there"):
        await check_vocabulary([teacher], tokenizer("a", "b", "c"))
    await check_vocabulary(
        [SimpleNamespace(base_model="same", get_tokenizer=longer)],  # type: ignore[list-item]
        tokenizer("a", "b", "c"),
    )


@pytest.mark.parametrize(
    "of", [credit.distil, partial(credit.distil, top_k=4), partial(credit.kl, beta=0.1)]
)
@pytest.mark.anyio
async def test_with_such_a_teacher_nothing_is_sampled_or_trained(of: Any, tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        words = (await trainer.get_tokenizer()).get_vocab()
        turned = dict(zip(words, reversed(words.values()), strict=True))
        base = await service.create_sampling_client(base_model="fake")

        async def backwards() -> Any:
            return SimpleNamespace(get_vocab=lambda: turned)

        names = ("base_model", "compute_logprobs", "model_info", "sample")
        same = {name: getattr(base, name) for name in names}
        plan = replace(PLAN, credit=of(SimpleNamespace(**same, get_tokenizer=backwards)))

        def unasked(task: Task, reply: Any) -> float:
            raise AssertionError("a reply was sampled")

        begin = time.monotonic()
        with pytest.raises(ConfigError, match="another vocabulary"):
            await on_policy(trainer, TASKS, single_turn(unasked), plan)
        assert time.monotonic() - begin < 2
        assert (await trainer.get_info()).step == 0


@pytest.mark.anyio
async def test_advantage_is_the_short_form(tmp_path: Path) -> None:
    short, rows = await trained(tmp_path / "1", replace(PLAN, advantage="standardised"))
    plan = replace(PLAN, credit=credit.outcome("standardised"))
    long, same = await trained(tmp_path / "2", plan)
    assert short == long
    assert rows[6]["credit/abs_max"] == same[6]["credit/abs_max"] > 0
    assert plan.as_config()["credit"] == "outcome(standardised)"
    assert PLAN.as_config()["advantage"] == "group_centred"


@pytest.mark.anyio
async def test_kl_and_distil_ask_the_real_thing(tmp_path: Path) -> None:
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        base = await service.create_sampling_client(base_model="fake")
        both = credit.total(credit.outcome(), credit.kl(base, beta=0.1))
        plan = replace(PLAN, credit=both)
        done = await on_policy(trainer, TASKS, single_turn(vowels), plan, reference=base)
        assert done.metrics["kl/reference"] > 0
        assert done.metrics["credit/kl/mean_abs"] > 0
        student = await service.create_model(base_model="fake")
        teach = replace(PLAN, steps=12, learning_rate=0.1, credit=credit.distil(done.sampler))
        first = await on_policy(student, TASKS, single_turn(vowels), replace(teach, steps=1))
        last = await on_policy(student, TASKS, single_turn(vowels), teach)
    assert 0 < last.metrics["kl/teacher"] < 0.5 * first.metrics["kl/teacher"]
