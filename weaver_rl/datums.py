"""Training sequences: from rollouts with marks to the datums of a loss, exactly aligned.

Called by `weaver_rl.algorithms.step`. A segment of T tokens becomes arrays of length N = T − 1:
position i reads token i and predicts token i+1, so what belongs to token i+1 stands at i.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from weaver.types import Datum, ModelInput
from weaver_rl.credit.marks import Marks
from weaver_rl.divergences import SoftTargets
from weaver_rl.objectives import Aggregate, Behaviour, Objective
from weaver_rl.types import Group, Rollout, Segment

FloatN = npt.NDArray[np.float64]
IntN = npt.NDArray[np.int64]
LARGEST = 300.0
"""Nats of a log-ratio that is exponentiated for a metric; far beyond that is no number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One segment, ready to be trained on. Everything but `tokens` is of shape [N]."""

    tokens: tuple[int, ...]
    """All T = N + 1 of them."""
    mask: FloatN
    """1 where the target was sampled."""
    q: FloatN
    """Log-probability of the target when it was sampled, at the loss' temperature; 0 elsewhere."""
    policy: FloatN
    """The same, untempered."""
    versions: IntN
    """Weights that sampled the target; -1 elsewhere."""
    advantages: FloatN
    counts: FloatN
    """How much each token counts, by its marks; 0 where mask is 0."""
    weights: FloatN
    """Share of each token in the loss; 0 where it does not count."""
    reference: FloatN
    """Log-probability of the target under the reference model, untempered; 0 where none is."""
    rollout: int
    """Which rollout of the batch it is part of, from 0."""
    place: tuple[int, int, int]
    """Group, rollout of the group, segment of the rollout; from 0."""
    soft: tuple[SoftTargets, ...] = ()
    """What teachers say of each target; weights are shares in the loss, as above."""


def examples(
    groups: Sequence[Group],
    marks: Sequence[Sequence[Marks]],
    *,
    behaviour: Behaviour,
    aggregate: Aggregate | None,
) -> list[Example]:
    """The segments of all rollouts that did not fail; those of which no token counts are left out.

    Weights are those of the marks, for the aggregate "sequence" divided by their sum in a rollout.
    """
    made: list[Example] = []
    number = 0
    for p, (group, marks_G) in enumerate(zip(groups, marks, strict=True)):
        for g, (rollout, one) in enumerate(zip(group.rollouts, marks_G, strict=True)):
            total = float(one.weights.sum())
            if rollout.failure is not None or not total:
                continue
            share = 1.0 / total if aggregate == "sequence" else 1.0
            columns = by_segment(rollout, one.advantages), by_segment(rollout, one.weights)
            softs = [_soft_by_segment(rollout, soft) for soft in one.soft]
            segments = zip(rollout.trajectory.segments, *columns, strict=True)
            for s, (segment, advantages, counts) in enumerate(segments):
                if counts[1:].any():
                    example = _example(
                        segment, advantages, counts, share, behaviour, number, (p, g, s)
                    )
                    said = tuple(
                        replace(soft[s], weights=soft[s].weights * example.weights)
                        for soft in softs
                    )
                    made.append(replace(example, soft=said))
            number += 1
    return made


def by_segment(rollout: Rollout, values: FloatN) -> list[FloatN]:
    """Numbers of the sampled tokens where they stand in each segment, [T] each, 0 elsewhere."""
    made = []
    begin = 0
    for segment in rollout.trajectory.segments:
        mask = np.array(segment.mask, dtype=np.bool_)
        end = begin + int(mask.sum())
        placed = np.zeros(len(mask))
        placed[mask] = values[begin:end]
        made.append(placed)
        begin = end
    return made


def _soft_by_segment(rollout: Rollout, soft: SoftTargets) -> list[SoftTargets]:
    """The rows of the sampled tokens where they are targets of each segment, [N] each."""
    made = []
    begin = 0
    for segment in rollout.trajectory.segments:
        mask = np.array(segment.mask, dtype=np.bool_)
        end = begin + int(mask.sum())
        made.append(soft.rows(begin, end).placed(mask).rows(1, len(mask)))
        begin = end
    return made


def denominator(batch: Sequence[Example], aggregate: Aggregate | None, *, max_tokens: int) -> float:
    """What the summed loss of a batch is divided by; see `Objective.aggregate`. 1 of none."""
    rollouts = len({example.rollout for example in batch})
    if aggregate == "constant":
        return float(rollouts * max_tokens) or 1.0
    if aggregate == "sequence":
        return float(rollouts) or 1.0
    return float(sum(example.counts.sum() for example in batch)) or 1.0


def to_datum(example: Example, loss_fn: str) -> Datum:
    """The inputs that a policy loss needs; for `cross_entropy` the advantage is the weight."""
    inputs: dict[str, object] = {"target_tokens": example.tokens[1:]}
    if loss_fn == "cross_entropy":
        inputs["weights"] = example.weights * example.advantages
    else:
        inputs |= {
            "logprobs": example.q,
            "advantages": example.advantages,
            "weights": example.weights,
        }
    return Datum(model_input=ModelInput.from_ints(example.tokens[:-1]), loss_fn_inputs=inputs)


def kl_datum(example: Example) -> Datum:
    """For the loss `dro`: with zero advantages it is ½β(lp − lp_ref)², the KL penalty."""
    flat = replace(
        example, q=example.reference * example.mask, advantages=np.zeros_like(example.mask)
    )
    return to_datum(flat, "dro")


def corrected(
    batch: Sequence[Example], now: Sequence[FloatN], *, objective: Objective
) -> list[Example]:
    """Replaces q by the policy `now` ([N] each), weighting tokens by the truncated ratio π_now/q.

    Token: min(exp(now − q), cap) (arXiv:2505.24298 decouples the same way). Sequence: the ratio of
    the whole rollout, all its segments together. None: no weight.
    """
    ratios = _log_ratios(batch, now, by_rollout=objective.correction == "sequence")
    ceiling = np.log(max(objective.correction_cap, 1e-30))
    weighs = objective.correction in ("token", "sequence")
    return [
        replace(
            example,
            q=lp * example.mask,
            weights=example.weights * (np.exp(np.minimum(ratio, ceiling)) if weighs else 1.0),
        )
        for example, ratio, lp in zip(batch, ratios, now, strict=True)
    ]


def off_policy_metrics(
    batch: Sequence[Example], now: Sequence[FloatN], *, objective: Objective
) -> dict[str, float]:
    """How far the trainer's policy `now` ([N] each) is from the sampler, before any correction.

    Over sampled tokens, r = π_now/q: `off_policy/kl` estimates KL(sampler ‖ trainer), in nats a
    token (k3, kl_approx of Schulman 2020); `/ess` is the effective sample size (Σr)²/Σr² as a
    fraction of the tokens; `/ratio_max` the largest r; `/truncated_fraction` the share of r (of the
    whole rollout for the correction "sequence") above the cap: `ratio_cap`, or `correction_cap`.
    """
    masks = np.concatenate([example.mask > 0 for example in batch])
    by_rollout = _log_ratios(batch, now, by_rollout=objective.correction == "sequence")
    log_r = np.concatenate(_log_ratios(batch, now, by_rollout=False))[masks]
    r = np.exp(np.minimum(log_r, LARGEST))
    relative = np.exp(log_r - log_r.max())
    cap = objective.config.get("ratio_cap", objective.correction_cap)
    beyond = np.concatenate(by_rollout)[masks] > np.log(max(cap, 1e-30))
    return {
        "off_policy/kl": float((r - 1 - log_r).mean()),
        "off_policy/ess": float(relative.mean() ** 2 / (relative**2).mean()),
        "off_policy/ratio_max": float(r.max()),
        "off_policy/truncated_fraction": float(beyond.mean()),
    }


def one_ratio(batch: Sequence[Example], now: Sequence[FloatN]) -> list[Example]:
    """Shifts q so that the mean of now − q is that of the whole rollout in each of its segments.

    The ratio of the engine's `gspo` covers a datum, that of its paper a rollout. With q shifted at
    these very weights value, clip and gradient are the rollout's: d log s = Σ ∇lp / (all tokens).
    """
    gaps = _log_ratios(batch, now, by_rollout=False)
    totals = _by_rollout(batch, gaps)
    counts = _by_rollout(batch, [example.mask for example in batch])
    return [
        replace(
            e, q=e.q + e.mask * (gap.sum() / e.mask.sum() - totals[e.rollout] / counts[e.rollout])
        )
        for e, gap in zip(batch, gaps, strict=True)
    ]


def logprob_gap(batch: Iterable[Example], now: Iterable[FloatN], *, version: int) -> float | None:
    """The largest |lp − q| of the tokens that the weights `version` sampled; None: there are none.

    With `now` computed by those very weights this is trainer against sampler.
    """
    largest: float | None = None
    for example, lp in zip(batch, now, strict=True):
        here = (example.versions == version) & (example.mask > 0)
        if here.any():
            gap = float(np.abs(lp - example.q)[here].max())
            largest = gap if largest is None else max(largest, gap)
    return largest


def _log_ratios(
    batch: Sequence[Example], now: Sequence[FloatN], *, by_rollout: bool
) -> list[FloatN]:
    """now − q at sampled tokens, 0 elsewhere; or its sum over the rollout at every token."""
    gaps = [(lp - e.q) * e.mask for e, lp in zip(batch, now, strict=True)]
    if not by_rollout:
        return gaps
    totals = _by_rollout(batch, gaps)
    return [np.full_like(gap, totals[e.rollout]) for e, gap in zip(batch, gaps, strict=True)]


def _by_rollout(batch: Sequence[Example], values: Sequence[FloatN]) -> dict[int, float]:
    totals: dict[int, float] = {}
    for example, value in zip(batch, values, strict=True):
        totals[example.rollout] = totals.get(example.rollout, 0.0) + float(value.sum())
    return totals


def _example(
    segment: Segment,
    advantages: FloatN,
    counts: FloatN,
    share: float,
    behaviour: Behaviour,
    rollout: int,
    place: tuple[int, int, int],
) -> Example:
    mask = np.array(segment.mask[1:], dtype=np.float64)
    policy = np.array(segment.logprobs[1:], dtype=np.float64)
    drawn = np.array(segment.sampling_logprobs[1:], dtype=np.float64)
    return Example(
        tokens=segment.tokens,
        mask=mask,
        q=(drawn if behaviour.tempered else policy) * mask,
        policy=policy * mask,
        versions=np.array(segment.versions[1:], dtype=np.int64),
        advantages=advantages[1:],
        counts=counts[1:],
        weights=share * counts[1:],
        reference=np.zeros_like(mask),
        rollout=rollout,
        place=place,
    )
