"""What the cards of credits, losses of pairs and divergences are measured by; `measure` runs them.

A card is one line of CARDS: its page, a run of a service and a seed, as the learning proofs have,
and what its numbers mean. All of a page learn the same from the same data, so that they compare.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import weaver_rl as rl
from recipes.distillation import ROWS
from weaver_rl.proofs import GUESSING, HELD_OUT, LORA, MODEL, PLAN, SAMPLING, TRAIN, Outcome
from weaver_rl.tasks.guess_number import guess_by_halving, guess_number_tasks
from weaver_rl.tasks.words import exact, preference_pairs

if TYPE_CHECKING:
    from weaver import AsyncSamplingClient, AsyncServiceClient, AsyncTrainingClient

Measure = Callable[["AsyncServiceClient", int], Awaitable[Outcome]]
GREEDY = SAMPLING.model_copy(update={"temperature": 0.0})


@dataclass(frozen=True, slots=True)
class Card:
    page: str
    """Of docs/, without its suffix; the card stands there between marks of its name."""
    run: Measure
    end: str
    """What the value of its outcome is."""
    low: float = 0.0
    """Of the curve's scale."""
    high: float = 1.0


async def curve_of(trainer: AsyncTrainingClient, metric: str) -> tuple[float, ...]:
    """By step, without the evaluation before the first."""
    return tuple(point.value for point in await trainer.read_metrics(metric) if point.step)


def guessing(credit: Callable[[], rl.Credit]) -> Measure:
    """Guessing 1 to 31, each guess rewarded by how well it splits; value: games won by halving."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        tasks, played = guess_number_tasks(31, upper=31), rl.each(guess_by_halving)
        trainer = await service.create_model(MODEL, LORA, seed=seed)
        plan = replace(GUESSING, seed=seed, credit=credit())
        done = await rl.on_policy(trainer, tasks, played, plan, run=rl.Run())
        greedy = plan.sampling.model_copy(update={"temperature": 0.0})
        found = await rl.evaluate(done.sampler, tasks, environment=played, sampling=greedy)
        assert found.mean is not None
        curve = await curve_of(trainer, "reward/mean")
        return Outcome(value=found.mean.value, passed=True, curve=curve)

    return run


async def judged_turns(task: rl.Task, rollout: rl.Rollout) -> list[float]:
    """What a process reward would say of each guess: here what the environment knows."""
    return list(rollout.trajectory.turn_rewards)


async def near_the_base(service: AsyncServiceClient, seed: int) -> Outcome:
    """Reversing words with a penalty of 0.05 a nat; value: mean of log π/π_ref at the end, nats."""
    reference = await service.create_sampling_client(base_model=MODEL)
    credit = rl.credit.total(rl.credit.outcome(), rl.credit.kl(reference, beta=0.05))
    trainer, _ = await reversing(service, seed, credit)
    nats = await curve_of(trainer, "kl/reference")
    curve = await curve_of(trainer, "reward/mean")
    return Outcome(value=sum(nats[-3:]) / 3, passed=True, curve=curve)


def distilled(credit: Callable[[AsyncSamplingClient], rl.Credit]) -> Measure:
    """A teacher fine-tuned to reverse words; value: held-out words that the student gets right."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        teacher = await service.create_model(MODEL, LORA, seed=seed)
        examples = [{"prompt": one["prompt"], "completion": one["answer"]} for one in TRAIN]
        taught = rl.SupervisedPlan(epochs=3, batch_tokens=1024, learning_rate=2e-3, seed=seed)
        known = await rl.supervised(teacher, examples, taught, run=rl.Run())
        trainer, student = await reversing(service, seed, credit(known.sampler))
        ends = []
        for sampler in (known.sampler, student.sampler):
            found = await rl.evaluate(sampler, HELD_OUT, reward=exact, sampling=GREEDY)
            assert found.mean is not None
            ends.append(found.mean.value)
        curve = await curve_of(trainer, "reward/mean")
        return Outcome(value=ends[1], passed=True, curve=curve, note=f"teacher {ends[0]:.2f}")

    return run


async def reversing(
    service: AsyncServiceClient, seed: int, credit: rl.Credit
) -> tuple[AsyncTrainingClient, rl.Result]:
    trainer = await service.create_model(MODEL, LORA, seed=seed)
    plan = replace(PLAN, steps=20, groups_per_step=16, learning_rate=2e-3, seed=seed, credit=credit)
    played = rl.single_turn(exact)
    return trainer, await rl.on_policy(trainer, TRAIN, played, plan, run=rl.Run())


def preferring(loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"]) -> Measure:
    """The recipe's pairs; value: held-out pairs whose preferred reply has the larger reward."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        trainer = await service.create_model(MODEL, LORA, seed=seed)
        pairs = preference_pairs(1100, seed=1)
        plan = rl.PreferencePlan(
            loss=loss, epochs=2, steps=40, batch_size=32, learning_rate=1e-3, seed=seed
        )
        done = await rl.preference(trainer, pairs[100:], plan, held_out=pairs[:100], run=rl.Run())
        liked = await curve_of(trainer, "train/chosen_logprob")
        return Outcome(
            value=done.metrics["eval/accuracy"],
            passed=True,
            curve=await curve_of(trainer, "train/accuracy"),
            note=f"log π of preferred replies {liked[0]:.0f} → {liked[-1]:.0f}",
        )

    return run


async def scoring(service: AsyncServiceClient, seed: int) -> Outcome:
    """The same of a reward model."""
    trainer = await service.create_model(MODEL, LORA, head="scalar", seed=seed)
    pairs = preference_pairs(1100, seed=1)
    plan = rl.PreferencePlan(
        loss="bradley_terry", epochs=2, steps=40, batch_size=32, learning_rate=1e-3, seed=seed
    )
    done = await rl.preference(trainer, pairs[100:], plan, held_out=pairs[:100], run=rl.Run())
    apart = await curve_of(trainer, "train/margin")
    return Outcome(
        value=done.metrics["eval/accuracy"],
        passed=True,
        curve=await curve_of(trainer, "train/accuracy"),
        note=f"scores apart {apart[0]:.1f} → {apart[-1]:.1f}",
    )


def nearing(beta: float, lmbda: float) -> Measure:
    """The recipe's rows, a teacher who copies words; value: held-out words that are copied."""

    async def run(service: AsyncServiceClient, seed: int) -> Outcome:
        teacher = await service.create_sampling_client(base_model=MODEL)
        trainer = await service.create_model(MODEL, LORA, seed=seed)
        plan = rl.DistilPlan(
            beta=beta,
            lmbda=lmbda,
            top_k=16,
            steps=30,
            learning_rate=2e-3,
            sampling=SAMPLING,
            seed=seed,
        )
        done = await rl.distil(trainer, ROWS[:1000], plan, teacher=teacher, run=rl.Run())
        found = await rl.evaluate(done.sampler, ROWS[1000:], reward=exact, sampling=GREEDY)
        assert found.mean is not None
        curve = await curve_of(trainer, "train/agreement")
        return Outcome(value=found.mean.value, passed=True, curve=curve)

    return run


CARDS: Mapping[str, Card] = {
    "outcome": Card("credit", guessing(rl.credit.outcome), "greedy", low=-6.0, high=0.0),
    "turns": Card(
        "credit", guessing(partial(rl.credit.turns, discount=0.0)), "greedy", low=-6.0, high=0.0
    ),
    "steps": Card(
        "credit",
        guessing(partial(rl.credit.steps, judged_turns, discount=1.0)),
        "greedy",
        low=-6.0,
        high=0.0,
    ),
    "kl": Card("credit", near_the_base, "nats from the base"),
    "distil": Card("credit", distilled(rl.credit.distil), "held out"),
    "distil_top_k": Card("credit", distilled(partial(rl.credit.distil, top_k=16)), "held out"),
    **{
        loss: Card("preferences", preferring(loss), "held-out pairs right")
        for loss in ("dpo", "ipo", "kto", "simpo", "orpo")
    },
    "bradley_terry": Card("preferences", scoring, "held-out pairs right"),
    "forward_kl": Card("objectives", nearing(0.0, 0.0), "held out"),
    "jsd": Card("objectives", nearing(0.5, 0.5), "held out"),
    "reverse_kl": Card("objectives", nearing(1.0, 1.0), "held out"),
}
"""By the card's mark; one more is one more line, and the marks on its page."""
