"""`supervised`: fine-tuning on examples. Recipes call it.

Batches are drawn under a token budget, in a seeded order that is new each epoch. The next step is
submitted before the last is awaited, so that the engine never waits for this loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
from anyio.lowlevel import checkpoint

from weaver import AsyncSamplingClient, AsyncTrainingClient, OperationHandle
from weaver.errors import ConfigError, InvalidRequestError
from weaver.types import Datum, ForwardBackwardResult, OptimStepResult
from weaver_rl.algorithms.run import Result, Run, shows_progress
from weaver_rl.conversations import cut_datum, to_datum
from weaver_rl.data import check_tasks
from weaver_rl.evaluation import Evaluate
from weaver_rl.metrics import train_metrics
from weaver_rl.plan import Steps, at_least
from weaver_rl.run_folder import Manifest

__all__ = ["SupervisedPlan", "TooLong", "supervised"]

Handles = tuple[OperationHandle[ForwardBackwardResult], OperationHandle[OptimStepResult]]
log = logging.getLogger(__name__)

TooLong = Literal["refuse", "cut", "drop"]
"""What becomes of an example longer than `max_length`. refuse: an error that names it; cut: its
first tokens are learned, and one of which nothing is left to learn is dropped; drop: it is left
out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a model would learn from a data set, and what of it was too long."""

    datums: list[Datum]
    cut: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedPlan(Steps):
    """`SupervisedPlan(epochs=3, batch_tokens=4096, learning_rate=1e-3)`"""

    epochs: int = 1
    steps: int | None = None
    """The most steps, where that ends before the epochs do; None: all epochs."""
    batch_tokens: int = 4096
    """At most so many tokens a step; a longer example is a batch of its own."""
    roles: tuple[str, ...] = ("assistant",)
    """Messages of these are learned."""
    max_length: int | None = None
    """Tokens of the longest example; None, and at most: what the model's context holds."""
    too_long: TooLong = "refuse"

    def __post_init__(self) -> None:
        Steps.__post_init__(self)
        at_least(1, self, "epochs", "batch_tokens")
        if self.too_long not in get_args(TooLong):
            raise ConfigError(f"is {self.too_long!r}.", field="too_long", hint="refuse, cut, drop.")
        if self.max_length is not None:
            at_least(2, self, "max_length")
        if self.steps is not None and self.steps < 0:
            raise ConfigError(f"is {self.steps}.", field="steps", hint="At least 0, or None.")


@shows_progress
async def supervised(
    trainer: AsyncTrainingClient,
    examples: Sequence[Mapping[str, Any]],
    plan: SupervisedPlan,
    *,
    held_out: Sequence[Mapping[str, Any]] = (),
    run: Run | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Trains on all examples, as the plan says; forms of an example: `weaver_rl.conversations`.

    Args:
        held_out: examples whose mean loss per token is logged as `eval/loss`.
        evaluate: as of `on_policy`.

    Raises:
        InvalidRequestError: no examples, or one that cannot be learned; names it.
    """
    check_tasks(examples, fields=(), source="examples")
    run = run or Run()
    encoded = await to_datums(trainer, examples, plan)
    tests = (await to_datums(trainer, held_out, plan, source="held_out")).datums
    steps = _planned(encoded.datums, plan)
    done, version = await run.restore(trainer, steps=len(steps))

    async def measure() -> dict[str, float]:
        measured: dict[str, float] = {}
        if plan.too_long != "refuse":
            measured |= {"data/cut": encoded.cut, "data/dropped": encoded.dropped}
        if tests:
            measured["eval/loss"] = (await trainer.forward(tests)).metrics["loss"]
        if evaluate is not None:
            measured |= await evaluate(await trainer.save_weights_and_get_sampling_client())
        return measured

    def submit(step: int) -> Handles:
        batch = [encoded.datums[i] for i in steps[step]]
        adam = plan.adam_params(step, trainer.model_info)
        return trainer.forward_backward(batch), trainer.optim_step(adam)

    metrics = await run.evaluate_first(measure, plan, done=done.step, steps=len(steps))
    ahead: Handles | None = None
    begin = time.monotonic()
    for step in range(done.step, len(steps)):
        gradient, update = ahead or submit(step)
        version += 1
        evaluates = plan.evaluates(step + 1, steps=len(steps))
        # What reads or saves the weights behind this step must not find the next one in them.
        alone = run.is_due(step + 1, len(steps)) or evaluates
        ahead = None if alone else submit(step + 1)
        metrics = train_metrics([(await gradient).metrics, (await update).metrics])
        metrics["time/step_s"] = time.monotonic() - begin
        metrics |= await measure() if evaluates else {}
        begin = time.monotonic()
        await run.log(metrics, step=step + 1)
        if run.is_due(step + 1, len(steps)):
            await run.checkpoint(trainer, Manifest(step=step + 1, extra={"version": version}))
    sampler = await trainer.save_weights_and_get_sampling_client()
    return Result(final=sampler, steps=len(steps), version=version, metrics=metrics)


async def to_datums(
    client: AsyncTrainingClient | AsyncSamplingClient,
    examples: Sequence[Mapping[str, Any]],
    plan: SupervisedPlan,
    *,
    source: str = "examples",
) -> Encoded:
    """What the model of `client` would learn from the examples; dry runs call it too.

    Raises:
        InvalidRequestError: one cannot be learned, or is longer than the plan or the model's
            context allow and the plan refuses such; names it. Or none is left.
    """
    tokenizer = await client.get_tokenizer()
    context = client.model_info.context_length
    most = min(plan.max_length or context + 1, context + 1)  # the last token is only predicted
    refuse = plan.too_long == "refuse"
    datums: list[Datum] = []
    cut = dropped = 0
    for i, example in enumerate(examples):
        await checkpoint()  # a data set takes minutes, and the session has to be kept alive
        datum = to_datum(
            tokenizer,
            example,
            roles=plan.roles,
            max_length=plan.max_length if refuse else None,
            context_length=context if refuse else None,
            where=getattr(example, "where", f"{source}[{i}]"),
        )
        kept: Datum | None = datum
        if datum.model_input.length + 1 > most:
            kept = cut_datum(datum, most) if plan.too_long == "cut" else None
            cut, dropped = cut + (kept is not None), dropped + (kept is None)
        if kept is not None:
            datums.append(kept)
    if cut or dropped:
        log.warning("%s: %d cut to %d tokens, %d dropped.", source, cut, most, dropped)
    if examples and not datums:
        raise InvalidRequestError(
            f"are all longer than {most} tokens.", field=source, hint="Raise max_length, or cut."
        )
    return Encoded(datums=datums, cut=cut, dropped=dropped)


def batches(lengths: Sequence[int], batch_tokens: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices of every example once, in a seeded order, cut so that none exceeds the budget."""
    made: list[list[int]] = []
    used = 0
    for index in np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist():
        if not made or used + lengths[index] > batch_tokens:
            made.append([])
            used = 0
        made[-1].append(index)
        used += lengths[index]
    return made


def _planned(datums: Sequence[Datum], plan: SupervisedPlan) -> list[list[int]]:
    """The batches of all steps."""
    lengths = [datum.model_input.length for datum in datums]
    planned = (
        batch
        for epoch in range(plan.epochs)
        for batch in batches(lengths, plan.batch_tokens, seed=plan.seed, epoch=epoch)
    )
    return list(islice(planned, plan.steps))
