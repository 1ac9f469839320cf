"""Learning proofs: what this package claims to learn, each with a gate, and what must not learn.

`tests/learning` and `weaver_rl.selftest` run these definitions. Each trains weaver-nano with LoRA
of rank 8, alpha 32, on 32 prompts x 8 samples a step, and asks about words that it never trained
on. Proofs stand beside their negative controls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from weaver.types import SamplingParams
from weaver_rl.advantages import group_centred
from weaver_rl.environments import each, single_turn
from weaver_rl.evaluation import evaluate
from weaver_rl.loggers import Loggers
from weaver_rl.loops.off_policy import off_policy
from weaver_rl.loops.rejection import Keep, rejection
from weaver_rl.loops.run import Run
from weaver_rl.loops.supervised import SupervisedPlan, supervised
from weaver_rl.objectives import Objective
from weaver_rl.plan import Plan
from weaver_rl.tasks.guess_number import guess_number, guess_number_tasks
from weaver_rl.tasks.words import exact, reverse_tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from weaver import AsyncSamplingClient, AsyncServiceClient, AsyncTrainingClient
    from weaver_rl.environments import GroupEnvironment
    from weaver_rl.types import BoolPG, FloatPG, Group, Reply, Task

MODEL, LORA = "weaver-nano", {"rank": 8, "alpha": 32}
WORDS = reverse_tasks(1100, seed=1)
TRAIN, HELD_OUT = WORDS[:1000], WORDS[1000:]
SAMPLING = SamplingParams(max_tokens=12)


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
    learned = await _policy(service, _plan(seed))
    best = max(learned.curve[:40])
    return Outcome(
        value=learned.greedy,
        passed=best >= 0.90 and learned.greedy >= 0.95,
        curve=learned.curve,
        note=f"best mean reward within 40 steps {best:.3f}",
    )


def held_out_after(
    *, objective: str = "importance_sampling", advantage: str = "group_centred", passes: int = 1
) -> Callable[[AsyncServiceClient, int], Awaitable[Outcome]]:
    """The proof that held-out greedy reaches 0.90 with this objective and advantage.

    With two passes of two optimizer steps, ratios leave 1 and a clip has work to do.
    """

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        plan = replace(_plan(seed), objective=objective, advantage=advantage)
        plan = replace(plan, passes=passes, minibatches=passes)
        learned = await _policy(service, plan)
        return Outcome(
            value=learned.greedy,
            passed=learned.greedy >= 0.90,
            curve=learned.curve,
            note=f"sampled {learned.sampled:.3f}",
        )

    return run


async def rejection_sampling(service: AsyncServiceClient, seed: int) -> Outcome:
    trainer, curve = await service.create_model(MODEL, LORA, seed=seed), Curve("reward/mean")
    done = await rejection(
        trainer,
        TRAIN,
        single_turn(exact),
        _plan(seed),
        keep=Keep(threshold=1.0, unique=False),
        run=Run(loggers=Loggers(curve)),
    )
    greedy = await _greedy(done.sampler)
    return Outcome(value=greedy, passed=greedy >= 0.97, curve=curve.values)


async def supervised_tuning(service: AsyncServiceClient, seed: int) -> Outcome:
    trainer, curve = await service.create_model(MODEL, LORA, seed=seed), Curve("train/loss")
    examples = [{"prompt": one["prompt"], "completion": one["answer"]} for one in TRAIN]
    plan = SupervisedPlan(epochs=10, batch_tokens=2048, learning_rate=2e-3, seed=seed)
    done = await supervised(trainer, examples, plan, run=Run(loggers=Loggers(curve)))
    greedy = await _greedy(done.sampler)
    return Outcome(value=greedy, passed=greedy >= 0.99, curve=curve.values)


async def number_guessing(service: AsyncServiceClient, seed: int) -> Outcome:
    tasks = guess_number_tasks(7)
    plan = replace(_plan(seed), groups_per_step=7 * 4)
    learned = await _policy(
        service, plan, environment=each(guess_number), tasks=tasks * 4, held_out=tasks
    )
    won = learned.scores["won"]
    return Outcome(value=won, passed=won == 1.0, curve=learned.curve)


async def staleness(service: AsyncServiceClient, seed: int) -> Outcome:
    """The held-out difference of PPO's ratio and no correction, mean of three seeds."""
    ends: dict[str, list[float]] = {"ratio": [], "none": []}
    curve: tuple[float, ...] = ()
    for objective in (
        Objective(loss_fn="ppo", correction="ratio"),
        Objective(loss_fn="cross_entropy", correction="none"),
    ):
        for one in range(seed, seed + 3):
            plan = replace(_plan(one), objective=objective, max_staleness=8)
            learned = await _policy(service, plan)
            ends[str(objective.correction)].append(learned.greedy)
            curve = curve or learned.curve
    means = {name: float(np.mean(values)) for name, values in ends.items()}
    value = means["ratio"] - means["none"]
    note = f"with correction {means['ratio']:.3f}, without {means['none']:.3f}"
    return Outcome(value=value, passed=value >= 0.4, curve=curve, note=note)


async def random_reward(service: AsyncServiceClient, seed: int) -> Outcome:
    dice = Random(seed)

    def thrown(task: Task, reply: Reply) -> float:
        return float(dice.random() < 0.5)

    learned = await _policy(service, _plan(seed), environment=single_turn(thrown))
    return Outcome(value=learned.sampled, passed=learned.sampled <= 0.30, curve=learned.curve)


async def flipped_advantage(service: AsyncServiceClient, seed: int) -> Outcome:
    def flipped(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
        return -group_centred(rewards_P_G, valid_P_G)

    learned = await _policy(service, replace(_plan(seed), advantage=flipped))
    return Outcome(value=learned.sampled, passed=learned.sampled <= 0.05, curve=learned.curve)


async def zero_learning_rate(service: AsyncServiceClient, seed: int) -> Outcome:
    """The largest change of a log-probability, which must be exactly 0."""
    trainer = await service.create_model(MODEL, LORA, seed=seed)
    before = await _logprobs(trainer)
    learned = await _policy(
        service, replace(_plan(seed), steps=5, learning_rate=0.0), trainer=trainer
    )
    value = float(np.abs(await _logprobs(trainer) - before).max())
    return Outcome(value=value, passed=value == 0.0, curve=learned.curve)


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
            claim=f"So it does with the objective {name}.",
            gate="held-out greedy ≥ 0.90",
            run=held_out_after(objective=name, passes=2),
        )
        for name in ("ppo", "cispo", "gspo")
    ),
    *(
        Proof(
            name=name.replace("_", " "),
            claim=f"So it does with {name.replace('_', '-')} advantages.",
            gate="held-out greedy ≥ 0.90",
            run=held_out_after(advantage=name),
        )
        for name in ("standardised", "leave_one_out")
    ),
    Proof(
        name="rejection sampling",
        claim="Fine-tuning on its own right answers learns to reverse words.",
        gate="held-out greedy ≥ 0.97",
        run=rejection_sampling,
    ),
    Proof(
        name="supervised",
        claim="Fine-tuning on given answers learns to reverse words.",
        gate="held-out greedy ≥ 0.99",
        run=supervised_tuning,
    ),
    Proof(
        name="number guessing",
        claim="Over several turns, it learns to find a number by halving.",
        gate="greedy play finds every number of 1 to 7 in at most 3 guesses",
        run=number_guessing,
    ),
    Proof(
        name="staleness 8",
        claim="With rollouts eight steps old, PPO's correction is what keeps it learning.",
        gate="at least 0.4 better than with no correction, mean of 3 seeds",
        run=staleness,
    ),
    Proof(
        name="random reward",
        claim="A reward that is thrown teaches nothing.",
        gate="sampled ≤ 0.30",
        run=random_reward,
        control=True,
    ),
    Proof(
        name="flipped advantage",
        claim="With advantages of the wrong sign it unlearns.",
        gate="sampled ≤ 0.05",
        run=flipped_advantage,
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


class Curve:
    """A logger that keeps one metric, for the page."""

    name = "curve"

    def __init__(self, metric: str) -> None:
        self.values: tuple[float, ...] = ()
        self._metric = metric

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._metric in metrics:
            self.values += (metrics[self._metric],)

    def log_samples(self, groups: Sequence[Group], step: int) -> None: ...

    def state(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    curve: tuple[float, ...]
    greedy: float
    """Mean greedy reward of the held-out tasks."""
    sampled: float
    """The same at temperature 1, four samples a task."""
    scores: dict[str, float]
    """Mean greedy metrics of the environment."""


def _plan(seed: int) -> Plan:
    return Plan(steps=60, sampling=SAMPLING, seed=seed, max_failure_rate=0.0)


async def _policy(
    service: AsyncServiceClient,
    plan: Plan,
    *,
    environment: GroupEnvironment | None = None,
    tasks: Sequence[Task] = TRAIN,
    held_out: Sequence[Task] = HELD_OUT,
    trainer: AsyncTrainingClient | None = None,
) -> _Learned:
    trainer = trainer or await service.create_model(MODEL, LORA, seed=plan.seed)
    curve = Curve("reward/mean")
    done = await off_policy(
        trainer,
        tasks,
        environment or single_turn(exact),
        plan,
        run=Run(loggers=Loggers(curve)),
    )
    judged = environment if environment is not None and tasks is not TRAIN else single_turn(exact)
    greedy = await evaluate(
        done.sampler,
        held_out,
        environment=judged,
        sampling=plan.sampling.model_copy(update={"temperature": 0.0}),
    )
    sampled = await evaluate(
        done.sampler, held_out, environment=judged, sampling=plan.sampling, num_samples=4
    )
    assert greedy.mean is not None
    assert sampled.mean is not None
    rollouts = [rollout for group in greedy.groups for rollout in group.rollouts]
    scores = {
        name: float(np.mean([rollout.metrics[name] for rollout in rollouts]))
        for name in rollouts[0].metrics
    }
    return _Learned(
        curve=curve.values, greedy=greedy.mean.value, sampled=sampled.mean.value, scores=scores
    )


async def _greedy(sampler: AsyncSamplingClient) -> float:
    found = await evaluate(
        sampler,
        HELD_OUT,
        reward=exact,
        sampling=SAMPLING.model_copy(update={"temperature": 0.0}),
    )
    assert found.mean is not None
    return found.mean.value


async def _logprobs(trainer: AsyncTrainingClient) -> FloatPG:
    """Of every token of a held-out prompt and its answer."""
    sampler = await trainer.save_weights_and_get_sampling_client()
    tokenizer = await trainer.get_tokenizer()
    tokens = tokenizer.encode(HELD_OUT[0]["prompt"] + HELD_OUT[0]["answer"])
    scores = await sampler.compute_logprobs(tokens)
    return np.array(scores[1:], dtype=np.float64)
