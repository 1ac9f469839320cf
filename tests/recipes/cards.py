"""What the cards of preference losses are measured by; `measure` runs them.

A card is one line of CARDS: its page, a run of a service and a seed, as the learning proofs have,
and what its numbers mean. All of a page learn the same from the same data, so that they compare.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import weaver_rl as rl
from weaver_rl.proofs import LORA, MODEL, Outcome
from weaver_rl.tasks.words import preference_pairs

if TYPE_CHECKING:
    from weaver import AsyncServiceClient, AsyncTrainingClient

Measure = Callable[["AsyncServiceClient", int], Awaitable[Outcome]]


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


CARDS: Mapping[str, Card] = {
    **{
        loss: Card("preferences", preferring(loss), "held-out pairs right")
        for loss in ("dpo", "ipo", "kto", "simpo", "orpo")
    },
}
"""By the card's mark; one more is one more line, and the marks on its page."""
