"""`kl` and `distil`: what another model thinks of each sampled token, as credit.

Both ask it for the log-probabilities of the very tokens that were sampled, so it must have the
vocabulary of the one that is trained; loops check that by `check_vocabulary` before they begin.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from weaver import AsyncSamplingClient
from weaver.errors import ConfigError
from weaver.types import ModelInput
from weaver_rl.credit.marks import FloatS, Marks, NamedCredit, level
from weaver_rl.credit.turns import check_discount, to_go
from weaver_rl.divergences import SoftTargets, check_top_k, soft_targets
from weaver_rl.guard import gather
from weaver_rl.types import Group, Rollout


def kl(reference: AsyncSamplingClient, *, beta: float, discount: float = 1.0) -> NamedCredit:
    """The KL to a reference as a penalty in the reward: −β·Σ_{s≥t} γ^{s−t}·log(π/π_ref)_s.

    Each token answers for its own penalty and for those behind it in its rollout, since it decided
    what came there. With γ = 1 the gradient is exactly that of −β·KL(π ‖ π_ref) of whole rollouts;
    a token's own penalty alone (γ = 0) is the gradient of a KL in the loss (arXiv:2510.01555). In
    units of reward and neither centred nor standardised: for the advantage of REINFORCE++
    (arXiv:2501.03262, eq. 4 and 5), which standardises both together, write
    `whitened(total(outcome("raw"), kl(reference, beta=0.01)))`.

    Args:
        beta: reward per nat, at least 0.
        discount: γ in [0, 1].

    Raises:
        ConfigError: at construction; names the argument.
    """
    if not 0 <= beta < float("inf"):
        raise ConfigError(f"is {beta!r}.", field="beta", hint="At least 0, in reward per nat.")
    label = f"kl(beta={beta:g}, discount={discount:g})"
    return _scored(label, reference, scale=beta, discount=discount, measured="kl/reference")


def distil(
    teacher: AsyncSamplingClient, *, discount: float = 0.0, top_k: int | None = None
) -> NamedCredit:
    """On-policy distillation: the advantage of a token is log π_teacher − log π, in nats.

    That is the reverse KL to the teacher, token by token, on the student's own samples (Agarwal et
    al., arXiv:2306.13649; Gu et al., MiniLLM, arXiv:2306.08543). Rewards are not looked at.

    With `top_k` each place has the reverse KL of the whole distribution in its loss, in the place
    of the one sampled token's share in it: of the teacher's `top_k` likeliest tokens and all others
    as one (Tail-Aware OPD, arXiv:2608.14728; `divergences.divergence`). Its gradient is the mean of
    the other's over what the student might have sampled there, without that noise. Advantages are 0
    then.

    Args:
        discount: 0: each token for itself, as is usual; 1: the gradient of the KL of whole
            rollouts, noisier. 0 with `top_k`.
        top_k: 1 to 256; None: the sampled token alone.

    Raises:
        ConfigError: at construction; names the argument.
    """
    if top_k is None:
        label = f"distil(discount={discount:g})"
        return _scored(label, teacher, scale=1.0, discount=discount, measured="kl/teacher")
    check_top_k(teacher, top_k)
    if discount:
        raise ConfigError(f"is {discount!r} with top_k.", field="discount", hint="Leave it out.")

    async def one(rollout: Rollout) -> Marks:
        marks = level(rollout)
        segments = [s for s in rollout.trajectory.segments if any(s.mask)]
        if rollout.failure is not None or not segments:
            return marks
        ask = partial(soft_targets, teacher, top_k=top_k)
        said = await gather([partial(ask, s.tokens, np.array(s.mask) > 0) for s in segments])
        own = np.concatenate([np.array(s.logprobs)[np.array(s.mask) > 0] for s in segments])
        ratios = own - np.concatenate([found for _, found in said])
        columns = zip(
            *((soft.tokens, soft.logprobs, soft.weights) for soft, _ in said), strict=True
        )
        soft = SoftTargets(*map(np.concatenate, columns))
        return replace(marks, measured={"kl/teacher": ratios}, soft=(soft,))

    return _asking(f"distil(top_k={top_k})", teacher, one)


def _scored(
    label: str, model: AsyncSamplingClient, *, scale: float, discount: float, measured: str
) -> NamedCredit:
    if not hasattr(model, "compute_logprobs"):
        raise ConfigError(
            f"{model!r} gives no log-probabilities.",
            field=label.partition("(")[0],
            hint="Pass await service.create_sampling_client(base_model=...).",
        )
    check_discount(discount)

    async def one(rollout: Rollout) -> Marks:
        if rollout.failure is not None:
            return level(rollout)
        ratios = await log_ratios(rollout, model)
        return Marks(-scale * to_go(ratios, discount), np.ones(len(ratios)), {}, {measured: ratios})

    return _asking(label, model, one)


def _asking(
    label: str, model: AsyncSamplingClient, one: Callable[[Rollout], Awaitable[Marks]]
) -> NamedCredit:
    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        done = iter(await gather([partial(one, r) for group in groups for r in group.rollouts]))
        return [[next(done) for _ in group.rollouts] for group in groups]

    return NamedCredit(label, mark, models=(model,))


async def log_ratios(rollout: Rollout, model: AsyncSamplingClient) -> FloatS:
    """[S], log π − log π_model of the sampled tokens, untempered, in nats."""
    segments = [segment for segment in rollout.trajectory.segments if any(segment.mask)]
    inputs = [ModelInput.from_ints(segment.tokens) for segment in segments]
    scores = await gather([partial(model.compute_logprobs, one) for one in inputs])
    ratios = [
        own - (other or 0.0)  # what nothing stands before has None, and is not trained on
        for segment, there in zip(segments, scores, strict=True)
        for own, other, mask in zip(segment.logprobs, there, segment.mask, strict=True)
        if mask
    ]
    return np.array(ratios, dtype=np.float64)


async def check_vocabulary(
    models: Sequence[AsyncSamplingClient], tokenizer: Any, *, field: str = "credit"
) -> None:
    """Whether tokens of `tokenizer`, that of the model to be trained, mean the same to `models`.

    Args:
        field: what the error names.

    Raises:
        ConfigError: a token is another one there; names the first.
    """
    own = {index: token for token, index in tokenizer.get_vocab().items()}
    for model in models:
        other = await model.get_tokenizer()
        if other is tokenizer:
            continue
        theirs = {index: token for token, index in other.get_vocab().items()}
        wrong = [i for i in sorted(own) if theirs.get(i, own[i]) != own[i]]
        if wrong or len(theirs) < 0.9 * len(own):
            i = wrong[0] if wrong else len(theirs)
            raise ConfigError(
                f"{model.base_model} has another vocabulary: token {i} is "
                f"{theirs.get(i)!r} there and {own.get(i)!r} here.",
                field=field,
                hint="A teacher or reference must read the student's tokens: take one of its kind.",
            )
