"""Learning proofs: what this package claims to learn, each with a gate, and what must not learn.

`tests/learning` and `weaver_rl.cli` run these definitions. Each trains weaver-nano with LoRA
of rank 8, alpha 32, on 32 prompts x 8 samples a step, and asks about words that it never trained
on. Proofs stand beside their negative controls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Literal

import numpy as np

import weaver_rl as rl
from weaver import AsyncSamplingClient, AsyncServiceClient, AsyncTrainingClient
from weaver.types import AdamParams, SamplingParams
from weaver_rl.tasks.guess_number import guess_by_halving, guess_number, guess_number_tasks
from weaver_rl.tasks.words import exact, preference_pairs, reverse_tasks, ubbi_dubbi_tasks
from weaver_rl.types import BoolPG, FloatPG

MODEL, LORA = "weaver-nano", {"rank": 8, "alpha": 32}
WORDS = reverse_tasks(1100, seed=1)
TRAIN, HELD_OUT = WORDS[:1000], WORDS[1000:]
UNKNOWN = ubbi_dubbi_tasks(6100, seed=1, words=1)
"""Of which the model has every answer wrong."""
SAMPLING = SamplingParams(max_tokens=12)
PLAN = rl.Plan(steps=60, sampling=SAMPLING, max_failure_rate=0.0, adam=AdamParams())
"""Without clipping: what a control shows must not be what clipping hides."""
IN_FLIGHT = replace(
    PLAN, max_staleness=1, in_flight="reply", objective=rl.Objective(correction="token")
)
STANDARDISED = replace(PLAN, steps=40, advantage="standardised")
VARIANTS = {
    "ppo": replace(PLAN, steps=40, objective="ppo", passes=2, minibatches=2),
    "cispo": replace(STANDARDISED, objective="cispo", minibatches=16, learning_rate=5e-4),
    "gspo": replace(STANDARDISED, objective="gspo", minibatches=4),
    "standardised": STANDARDISED,
    "leave one out": replace(PLAN, steps=40, advantage="leave_one_out"),
}
"""With several optimizer steps for a batch, ratios leave 1 and a clip has work to do. CISPO's and
GSPO's are those of their papers, arXiv:2506.13585 and arXiv:2507.18071."""
GUESSING = replace(
    PLAN,
    steps=30,
    groups_per_step=16,
    group_size=4,
    learning_rate=2e-3,
    sampling=SamplingParams(max_tokens=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run of a proof showed: `Outcome(value=0.97, passed=True, curve=(0.48, ...))`"""

    value: float
    """What the gate is about."""
    passed: bool
    curve: tuple[float, ...] = ()
    """Mean reward (supervised: loss) by step."""
    note: str = ""
    """Other numbers, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One row of the table. `run` takes a service and a seed."""

    name: str
    claim: str
    gate: str
    run: Callable[[AsyncServiceClient, int], Awaitable[Outcome]]
    seeds: tuple[int, ...] = (0,)
    """Every one of them must pass."""
    control: bool = False
    """It must not learn."""


async def importance_sampling(service: AsyncServiceClient, seed: int) -> Outcome:
    sampler, curve = await _learn(service, replace(PLAN, seed=seed))
    greedy, best = await _held_out(sampler), max(curve[:40])
    return Outcome(
        value=greedy,
        passed=best >= 0.90 and greedy >= 0.95,
        curve=curve,
        note=f"best mean reward within 40 steps {best:.3f}",
    )


def held_out_after(
    plan: rl.Plan, *, gate: float = 0.90, loop: Callable[..., Awaitable[rl.Result]] = rl.off_policy
) -> Callable[[AsyncServiceClient, int], Awaitable[Outcome]]:
    """The proof that held-out greedy reaches the gate by this plan."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        sampler, curve = await _learn(service, replace(plan, seed=seed), loop=loop)
        greedy = await _held_out(sampler)
        return Outcome(value=greedy, passed=greedy >= gate, curve=curve)

    return run


async def supervised_tuning(service: AsyncServiceClient, seed: int) -> Outcome:
    trainer = await service.create_model(MODEL, LORA, seed=seed)
    given = [{**one, "completion": f" {one['answer']}"} for one in UNKNOWN[100:]]
    plan = rl.SupervisedPlan(epochs=2, batch_tokens=2048, learning_rate=2e-3, seed=seed)
    done = await rl.supervised(trainer, given, plan)
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    found = await rl.evaluate(done.sampler, UNKNOWN[:100], reward=exact, sampling=sampling)
    assert found.mean is not None
    greedy, curve = found.mean.value, await _curve(trainer, "train/loss")
    return Outcome(value=greedy, passed=greedy >= 0.80, curve=curve)


def preferring(
    loss: Literal["dpo", "simpo", "kto"], *, swapped: bool = False
) -> Callable[[AsyncServiceClient, int], Awaitable[Outcome]]:
    """The share of held-out pairs whose preferred reply has the larger reward; 0.5 is chance."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        trainer = await service.create_model(MODEL, LORA, seed=seed)
        pairs = preference_pairs(1100, seed=1)
        train, held_out = pairs[:1000], pairs[1000:]
        if swapped:
            train = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in train]
        plan = rl.PreferencePlan(loss=loss, batch_size=32, learning_rate=1e-3, seed=seed)
        done = await rl.preference(trainer, train, plan, held_out=held_out)
        right, curve = done.metrics["eval/accuracy"], await _curve(trainer, "train/loss")
        return Outcome(value=right, passed=right <= 0.1 if swapped else right >= 0.9, curve=curve)

    return run


async def number_guessing(service: AsyncServiceClient, seed: int) -> Outcome:
    tasks, played = guess_number_tasks(7), rl.each(guess_number)
    plan = replace(PLAN, steps=90, seed=seed, groups_per_step=7 * 4)
    sampler, curve = await _learn(service, plan, environment=played, tasks=tasks * 4)
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    found = await rl.evaluate(sampler, tasks, environment=played, sampling=greedy)
    won = float(np.mean([group.rollouts[0].metrics["won"] for group in found.groups]))
    return Outcome(value=won, passed=won == 1.0, curve=curve)


async def turn_credit(service: AsyncServiceClient, seed: int) -> Outcome:
    """How much more than the outcome's credit that of turns earns in the last ten steps."""
    curves = [
        await _guess(service, replace(GUESSING, seed=seed, credit=one))
        for one in (rl.credit.turns(discount=0.0), rl.credit.outcome())
    ]
    mine, others = (float(np.mean(curve[-10:])) for curve in curves)
    note = f"mean reward {mine:.2f}, with the outcome's credit {others:.2f}"
    value = mine - others
    return Outcome(value=value, passed=value >= 0.2, curve=curves[0], note=note)


async def dealt_turns(service: AsyncServiceClient, seed: int) -> Outcome:
    """How much more than in the first ten steps those turns earn in the last ten of 30."""
    curve = await _guess(service, replace(GUESSING, seed=seed, credit=shuffled_turns()))
    value = float(np.mean(curve[-10:]) - np.mean(curve[:10]))
    return Outcome(value=value, passed=value <= 0.5, curve=curve)


def shuffled_turns() -> rl.Credit:
    """`turns` of rewards that are dealt to the rollout's turns anew."""
    dice = Random(0)

    async def dealt(task: rl.Task, rollout: rl.Rollout) -> list[float]:
        rewards = list(rollout.trajectory.turn_rewards)
        return dice.sample(rewards, len(rewards))

    return rl.credit.steps(dealt, discount=0.0)


async def staleness(service: AsyncServiceClient, seed: int) -> Outcome:
    """The held-out difference of PPO's ratio and no correction, mean of three seeds."""
    means: list[float] = []
    curves: list[tuple[float, ...]] = []
    for objective in (
        rl.Objective(loss_fn="ppo", correction="ratio"),
        rl.Objective(loss_fn="cross_entropy", correction="none"),
    ):
        ends = []
        for one in range(seed, seed + 3):
            plan = replace(PLAN, steps=40, seed=one, objective=objective, max_staleness=8)
            sampler, curve = await _learn(service, plan)
            ends.append(await _held_out(sampler))
            curves.append(curve)
        means.append(float(np.mean(ends)))
    corrected, plain = means
    note = f"with correction {corrected:.3f}, without {plain:.3f}"
    value = corrected - plain
    return Outcome(value=value, passed=value >= 0.4, curve=curves[0], note=note)


def dealt(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    """Advantages of rewards that are dealt to any of their group's rollouts."""
    dice = np.random.default_rng(int(rewards_P_G.sum()))
    return rl.ADVANTAGES["group_centred"](dice.permuted(rewards_P_G, axis=1), valid_P_G)


def unlearning(
    plan: rl.Plan, *, steps: int = 40, at_most: float = 0.30, reward: rl.Reward = exact
) -> Callable[[AsyncServiceClient, int], Awaitable[Outcome]]:
    """The control that held-out samples get no better by this plan and reward."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        mine = replace(plan, seed=seed, steps=steps)
        sampler, curve = await _learn(service, mine, environment=rl.single_turn(reward))
        sampled = await _held_out(sampler, samples=4)
        return Outcome(value=sampled, passed=sampled <= at_most, curve=curve)

    return run


async def random_reward(service: AsyncServiceClient, seed: int) -> Outcome:
    dice = Random(seed)

    def thrown(task: rl.Task, reply: rl.Reply) -> float:
        return float(dice.random() < 0.5)

    return await unlearning(PLAN, reward=thrown)(service, seed)


def flipped(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    return -rl.ADVANTAGES["group_centred"](rewards_P_G, valid_P_G)


async def zero_learning_rate(service: AsyncServiceClient, seed: int) -> Outcome:
    """The largest change of a log-probability, which must be exactly 0."""
    trainer = await service.create_model(MODEL, LORA, seed=seed)
    before = await _logprobs(trainer)
    plan = replace(PLAN, seed=seed, steps=5, learning_rate=0.0)
    _, curve = await _learn(service, plan, trainer=trainer)
    value = float(np.abs(await _logprobs(trainer) - before).max())
    return Outcome(value=value, passed=value == 0.0, curve=curve)


PROOFS: tuple[Proof, ...] = (
    Proof(
        name="importance sampling",
        claim="Reinforcement learning by importance sampling learns to reverse words.",
        gate="mean reward ≥ 0.90 within 40 steps; held-out greedy ≥ 0.95 after 60",
        run=importance_sampling,
        seeds=(0, 1, 2, 3, 4),
    ),
    *(
        Proof(
            name=name,
            claim=f"Its variant {name} does, too.",
            gate="held-out greedy ≥ 0.90",
            run=held_out_after(plan),
        )
        for name, plan in VARIANTS.items()
    ),
    Proof(
        name="rejection sampling",
        claim="Fine-tuning on its own right answers learns to reverse words.",
        gate="held-out greedy ≥ 0.97",
        run=held_out_after(
            PLAN, gate=0.97, loop=partial(rl.rejection, keep=rl.Keep(threshold=1.0, unique=False))
        ),
    ),
    Proof(
        name="supervised",
        claim="Fine-tuning on given answers learns Ubbi Dubbi, of which nothing was known.",
        gate="held-out greedy ≥ 0.80; 0 before",
        run=supervised_tuning,
    ),
    Proof(
        name="number guessing",
        claim="Over several turns, it learns to find a number by halving.",
        gate="greedy play finds every number of 1 to 7 in at most 3 guesses",
        run=number_guessing,
    ),
    Proof(
        name="turn credit",
        claim="Guessing from 1 to 31, each guess's own reward teaches more than their sum.",
        gate="mean reward of the last ten of 30 steps at least 0.2 higher",
        run=turn_credit,
        seeds=(1,),
    ),
    Proof(
        name="shuffled turns",
        claim="The same rewards, dealt to any of the guesses, teach nothing.",
        gate="mean reward of the last ten of 30 steps at most 0.5 above that of the first ten",
        run=dealt_turns,
        seeds=(1,),
        control=True,
    ),
    Proof(
        name="staleness 8",
        claim="With rollouts eight steps old, PPO's correction is what keeps it learning.",
        gate="at least 0.4 better than with no correction, mean of 3 seeds",
        run=staleness,
    ),
    Proof(
        name="weights in flight",
        claim="It learns while weights move in the midst of its replies.",
        gate="held-out greedy ≥ 0.80",
        run=held_out_after(IN_FLIGHT, gate=0.80),
    ),
    Proof(
        name="dealt rewards",
        claim="Not from rewards that are dealt to other replies of a group.",
        gate="sampled ≤ 0.30 after 40 steps",
        run=unlearning(replace(IN_FLIGHT, advantage=dealt)),
        control=True,
    ),
    *(
        Proof(
            name=f"dealt rewards, {name}",
            claim=f"Neither does the variant {name}.",
            gate="sampled ≤ 0.30 after 20 steps",
            run=unlearning(replace(VARIANTS[name], advantage=dealt), steps=20),
            control=True,
        )
        for name in ("cispo", "gspo")
    ),
    *(
        Proof(
            name=f"{'swapped pairs' if swapped else 'preferences'} by {loss}",
            claim=f"By {loss} it learns which of two replies is preferred{', swapped' * swapped}.",
            gate=f"of held-out pairs {'≤ 0.1' if swapped else '≥ 0.9'} right; chance is 0.5",
            run=preferring(loss, swapped=swapped),
            control=swapped,
        )
        for loss in ("dpo", "simpo", "kto")
        for swapped in (False, True)
    ),
    Proof(
        name="random reward",
        claim="A reward that is thrown teaches nothing.",
        gate="sampled ≤ 0.30 after 40 steps",
        run=random_reward,
        control=True,
    ),
    Proof(
        name="flipped advantage",
        claim="With advantages of the wrong sign it unlearns.",
        gate="sampled ≤ 0.05 after 40 steps",
        run=unlearning(replace(PLAN, advantage=flipped), at_most=0.05),
        control=True,
    ),
    Proof(
        name="zero learning rate",
        claim="Without a learning rate nothing changes, in no bit.",
        gate="log-probabilities exactly unchanged",
        run=zero_learning_rate,
        control=True,
    ),
)


async def _learn(
    service: AsyncServiceClient,
    plan: rl.Plan,
    *,
    environment: rl.GroupEnvironment | None = None,
    tasks: Sequence[rl.Task] = TRAIN,
    trainer: AsyncTrainingClient | None = None,
    loop: Callable[..., Awaitable[rl.Result]] = rl.off_policy,
) -> tuple[AsyncSamplingClient, tuple[float, ...]]:
    """The final weights, and the mean reward by step."""
    trainer = trainer or await service.create_model(MODEL, LORA, seed=plan.seed)
    done = await loop(trainer, tasks, environment or rl.single_turn(exact), plan)
    return done.sampler, await _curve(trainer, "reward/mean")


async def _guess(service: AsyncServiceClient, plan: rl.Plan) -> tuple[float, ...]:
    """The mean reward by step, of guessing 1 to 31."""
    tasks, played = guess_number_tasks(31, upper=31), rl.each(guess_by_halving)
    return (await _learn(service, plan, environment=played, tasks=tasks))[1]


async def _curve(trainer: AsyncTrainingClient, metric: str) -> tuple[float, ...]:
    """By step, as the loop logged it to the service."""
    return tuple(point.value for point in await trainer.read_metrics(metric))


async def _held_out(sampler: AsyncSamplingClient, *, samples: int = 1) -> float:
    """The mean reward of words that were never trained on: greedy, or sampled at temperature 1."""
    sampling = SAMPLING.model_copy(update={"temperature": float(samples > 1)})
    found = await rl.evaluate(
        sampler, HELD_OUT, reward=exact, sampling=sampling, num_samples=samples
    )
    assert found.mean is not None
    return found.mean.value


async def _logprobs(trainer: AsyncTrainingClient) -> FloatPG:
    """Log-probabilities of every token of a held-out prompt and its answer."""
    sampler = await trainer.save_weights_and_get_sampling_client()
    tokenizer = await trainer.get_tokenizer()
    tokens = tokenizer.encode(HELD_OUT[0]["prompt"] + HELD_OUT[0]["answer"])
    scores = await sampler.compute_logprobs(tokens)
    return np.array(scores[1:], dtype=np.float64)
