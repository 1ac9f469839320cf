"""One step of a policy: from groups of rollouts to new weights. Both RL loops call it.

1. Marks from the plan's credit, checked; datums from trajectories.
2. A forward pass, if the objective replaces q by the policy of now, or the sampler told no q.
3. For each pass and minibatch: forward_backward, others for the KL in the loss and for what
   teachers say, optim_step; all are submitted before the first is awaited.
4. The trainer's log-probabilities are compared with the sampler's, before any correction: of the
   same weights they must agree; of older ones, how far they are apart is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from weaver import AsyncSamplingClient, AsyncTrainingClient, OperationHandle
from weaver.types import ForwardBackwardResult, ModelInput, OptimStepResult
from weaver_rl import datums
from weaver_rl.credit.marks import Marks, check_marks, short_name
from weaver_rl.datums import Example, FloatN
from weaver_rl.divergences import soft_loss
from weaver_rl.guard import gather
from weaver_rl.metrics import credit_metrics, train_metrics
from weaver_rl.objectives import behaviour
from weaver_rl.plan import Plan, check_gap, rounding_gap
from weaver_rl.types import Group


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stepped:
    metrics: dict[str, float]
    marks: list[list[Marks]]
    """Of each rollout of each group."""
    trained: tuple[tuple[Example, FloatN], ...]
    """With the sampler's q, each, and the trainer's log-probabilities [N] at the same temperature
    when it was first trained on; at the step's beginning where a forward pass came first."""
    version: int
    """Optimizer steps of the run, now."""


class _Submitted(NamedTuple):
    indices: list[int]
    gradient: OperationHandle[ForwardBackwardResult]
    kl_gradient: OperationHandle[ForwardBackwardResult] | None
    soft_gradients: list[OperationHandle[ForwardBackwardResult]]
    step: OperationHandle[OptimStepResult]


async def policy_step(
    trainer: AsyncTrainingClient,
    groups: Sequence[Group],
    plan: Plan,
    *,
    step: int,
    version: int,
    reference: AsyncSamplingClient | None = None,
) -> Stepped:
    """Trains on these groups: `plan.passes` · `plan.minibatches` optimizer steps.

    Args:
        step: of the loop, from 0; decides the learning rate and the minibatches.
        version: optimizer steps of the run before it.
        reference: the model of the KL in the loss, and of `kl/reference`.

    Raises:
        InvalidRequestError: the credit's marks do not fit; before anything is trained.
        LogprobGapError: above `plan.max_logprob_gap`, on tokens that these very weights sampled.
    """
    objective, acted = plan.loss, behaviour(plan.sampling)
    credit = plan.credited
    marks = check_marks(await credit(groups), groups, source=short_name(credit))
    credited = credit_metrics(groups, marks)
    batch = datums.examples(groups, marks, behaviour=acted, aggregate=objective.aggregate)
    if not batch:  # every group was dropped, nothing was sampled, or nothing counts
        metrics = {**credited, "train/skipped": 1.0}
        return Stepped(metrics=metrics, marks=marks, trained=(), version=version)
    if reference is not None:
        batch = await _with_reference(batch, reference)
    sampled, now = batch, None
    if objective.recomputes or not acted.known:
        now = await _forward(trainer, batch, temperature=acted.told)
        gap = datums.logprob_gap(batch, now, version=version)
        batch = datums.corrected(batch, now, objective=objective)
    if not acted.known:
        tempered = await _forward(trainer, batch, temperature=acted.temperature)
        batch = [replace(e, q=lp * e.mask) for e, lp in zip(batch, tempered, strict=True)]
    submitted = await _submit(trainer, batch, plan, step=step)
    results = [await one.gradient for one in submitted]
    if now is None:
        part = [batch[i] for i in submitted[0].indices]
        gap = datums.logprob_gap(part, _logprobs(results[0]), version=version)
        now = _first_logprobs(submitted, results)
    metrics = credited | await _metrics(submitted, results)
    metrics |= datums.off_policy_metrics(sampled, now, objective=objective)
    if reference is not None:
        metrics["kl/reference"] = _mean_kl(batch)
    if gap is not None:
        model, told = trainer.model_info, acted.told
        metrics |= {"gap/max": gap, "gap/rounding": rounding_gap(model, temperature=told)}
        check_gap(gap, model, allowed=plan.max_logprob_gap, temperature=told)
    return Stepped(
        metrics=metrics,
        marks=marks,
        trained=tuple(zip(sampled, now, strict=True)),
        version=version + len(submitted),
    )


def minibatches(batch: Sequence[Example], count: int, *, seed: Sequence[int]) -> list[list[int]]:
    """Indices of `count` parts, rollouts never torn; of one part, all in order. None is empty."""
    if count == 1:
        return [list(range(len(batch)))]
    rollouts = sorted({example.rollout for example in batch})
    shuffled = np.random.default_rng(list(seed)).permutation(rollouts)
    parts = [set(part.tolist()) for part in np.array_split(shuffled, count) if len(part)]
    return [[i for i, e in enumerate(batch) if e.rollout in part] for part in parts]


async def _submit(
    trainer: AsyncTrainingClient, batch: Sequence[Example], plan: Plan, *, step: int
) -> list[_Submitted]:
    objective, acted = plan.loss, behaviour(plan.sampling)
    given = {**objective.config, "temperature": acted.temperature}
    adam = plan.adam_params(step, trainer.model_info)
    torn = objective.loss_fn == "gspo" and len({e.rollout for e in batch}) < len(batch)
    submitted = []
    for number in range(plan.passes):
        for indices in minibatches(batch, plan.minibatches, seed=(plan.seed, step, number)):
            part = [batch[i] for i in indices]
            if torn:  # the engine's ratio covers a segment; that of the paper, a rollout
                here = await _forward(trainer, part, temperature=acted.temperature)
                part = datums.one_ratio(part, here)
            total = datums.denominator(
                part, objective.aggregate, max_tokens=plan.sampling.max_tokens
            )
            # where teachers say it all, nothing is left to differentiate here
            alone = all(e.soft and not e.advantages.any() for e in part)
            alone = alone and not objective.config and objective.loss_fn != "dro"
            score = trainer.forward if alone else trainer.forward_backward
            gradient = score(
                [datums.to_datum(example, objective.loss_fn) for example in part],
                objective.loss_fn,
                loss_fn_config=given | {"denominator": total},
            )
            kl_gradient = None
            if objective.kl_loss:
                kl_gradient = trainer.forward_backward(
                    [datums.kl_datum(example) for example in part],
                    "dro",
                    loss_fn_config={"beta": objective.kl_loss, "denominator": total},
                )
            softs = _submit_soft(trainer, part, denominator=total)
            stepped = trainer.optim_step(adam)
            submitted.append(_Submitted(indices, gradient, kl_gradient, softs, stepped))
    return submitted


def _submit_soft(
    trainer: AsyncTrainingClient, part: Sequence[Example], *, denominator: float
) -> list[OperationHandle[ForwardBackwardResult]]:
    """The reverse KL to each teacher at the sampled places."""
    vocab = trainer.model_info.vocab_size
    handles = []
    for number in range(max(len(example.soft) for example in part)):
        told = [(e.tokens, e.soft[number].within(vocab)) for e in part if len(e.soft) > number]
        loss = soft_loss([targets for _, targets in told], denominator=denominator)
        data = [targets.datum(tokens) for tokens, targets in told]
        handles.append(trainer.forward_backward_custom(data, loss))
    return handles


def _first_logprobs(
    submitted: Sequence[_Submitted], results: Sequence[ForwardBackwardResult]
) -> list[FloatN]:
    """[N] each, of the whole batch, when it was first trained on."""
    seen = {
        i: lp
        for one, result in reversed(list(zip(submitted, results, strict=True)))
        for i, lp in zip(one.indices, _logprobs(result), strict=True)
    }
    return [seen[i] for i in range(len(seen))]


async def _metrics(
    submitted: Sequence[_Submitted], results: Sequence[ForwardBackwardResult]
) -> dict[str, float]:
    kl_losses = [(await s.kl_gradient).metrics["loss"] for s in submitted if s.kl_gradient]
    soft_losses = [
        sum([(await one).metrics["loss"] for one in s.soft_gradients]) for s in submitted
    ]
    steps = [(await one.step).metrics for one in submitted]
    metrics = train_metrics([result.metrics for result in results])
    metrics |= {f"train/{name}": value for name, value in steps[-1].items()}
    metrics["train/grad_norm"] = max(step["grad_norm"] for step in steps)
    if kl_losses:
        metrics["train/kl_loss"] = float(np.mean(kl_losses))
        metrics["train/loss"] += metrics["train/kl_loss"]
    if submitted[0].soft_gradients:
        metrics["train/distil_loss"] = float(np.mean(soft_losses))
        metrics["train/loss"] += metrics["train/distil_loss"]
    return metrics


async def _forward(
    trainer: AsyncTrainingClient, batch: Sequence[Example], *, temperature: float
) -> list[FloatN]:
    """The trainer's log-probabilities of the targets now, [N] each."""
    data = [datums.to_datum(example, "cross_entropy") for example in batch]
    config = {"temperature": temperature, "denominator": 1.0}
    return _logprobs(await trainer.forward(data, "cross_entropy", loss_fn_config=config))


async def _with_reference(
    batch: Sequence[Example], reference: AsyncSamplingClient
) -> list[Example]:
    score = reference.compute_logprobs
    scores = await gather([partial(score, ModelInput.from_ints(e.tokens)) for e in batch])
    return [
        replace(example, reference=np.array(one[1:], dtype=np.float64))
        for example, one in zip(batch, scores, strict=True)
    ]


def _logprobs(result: ForwardBackwardResult) -> list[FloatN]:
    return [np.asarray(output["logprobs"], dtype=np.float64) for output in result.loss_fn_outputs]


def _mean_kl(batch: Sequence[Example]) -> float:
    """Mean over sampled tokens of log π − log π_ref, nats (k1)."""
    total = sum(float(((e.policy - e.reference) * e.mask).sum()) for e in batch)
    return total / sum(float(example.mask.sum()) for example in batch)
