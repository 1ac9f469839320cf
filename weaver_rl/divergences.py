"""How far a student's next tokens are from a teacher's, of which the K likeliest are known.

`algorithms.distillation` and the credit `distil` ask teachers by `soft_targets`, and train on what
they say by `soft_loss`. Suffixes: N places, K tokens at each; T tokens of a text. All in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from weaver import AsyncSamplingClient
from weaver.errors import ConfigError, InvalidRequestError
from weaver.fields import MOST_ALTERNATIVES
from weaver.types import Datum, ModelInput

if TYPE_CHECKING:
    import torch

FLOOR = 1e-6
"""What the K tokens leave over is at least so much: below, float32 rounds it away."""
LOWEST = -1e4
"""Nats, of what cannot be: its probability is 0, and 0 times it no NaN."""
ROUNDING = 1e-3
"""By which the probabilities of K tokens may sum to more than 1."""


@dataclass(frozen=True, slots=True, eq=False)
class SoftTargets:
    """`SoftTargets(tokens=[[5, 9]], logprobs=[[-0.1, -2.4]], weights=[1.0])`: a teacher's word."""

    tokens: npt.NDArray[np.int64]
    """[N, K], distinct where the weight is not 0."""
    logprobs: npt.NDArray[np.float64]
    """[N, K], the teacher's, untempered; −inf: the student has no such token."""
    weights: npt.NDArray[np.float64]
    """[N], each place's share in the loss."""

    def __post_init__(self) -> None:
        tokens, logprobs, weights = self.tokens.shape, self.logprobs.shape, self.weights.shape
        if tokens != logprobs or len(tokens) != 2 or weights != tokens[:1]:
            message = f"have the shapes {tokens}, {logprobs} and {weights}."
            hint = "Give tokens [N, K], their log-probabilities [N, K] and weights [N]."
            raise InvalidRequestError(message, field="soft targets", hint=hint)
        fine = (self.logprobs < ROUNDING).all(1) & np.isfinite(self.weights)
        if not fine.all():  # NaN is not below it either
            place = int(np.argmin(fine))
            message = (
                f"are {self.logprobs[place]} of weight {self.weights[place]} at place {place}."
            )
            hint = "Log-probabilities are at most 0."
            raise InvalidRequestError(message, field="soft targets", hint=hint)

    def within(self, vocab: int) -> SoftTargets:
        """Of a teacher whose embedding is longer: tokens from `vocab` on are in the rest."""
        there = self.tokens < vocab
        if there.all():
            return self
        return SoftTargets(
            np.where(there, self.tokens, 0), np.where(there, self.logprobs, -np.inf), self.weights
        )

    def rows(self, begin: int, end: int) -> SoftTargets:
        """Those from `begin` to before `end`."""
        return SoftTargets(
            self.tokens[begin:end], self.logprobs[begin:end], self.weights[begin:end]
        )

    def placed(self, at: npt.NDArray[np.bool_]) -> SoftTargets:
        """[len(at), K]: these rows where `at` is true, others of weight 0 elsewhere."""
        shape = (len(at), self.tokens.shape[1])
        made = SoftTargets(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(len(at)))
        made.tokens[at], made.logprobs[at] = self.tokens, self.logprobs
        made.weights[at] = self.weights
        return made

    def datum(self, tokens: Sequence[int]) -> Datum:
        """The student's text of T = N + 1 tokens, whose log-probabilities of the K are asked."""
        inputs = {"target_tokens": self.tokens}
        return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def check_top_k(teacher: AsyncSamplingClient, top_k: int) -> None:
    """Raises ConfigError: this is no teacher, or it cannot tell so many tokens."""
    if not hasattr(teacher, "compute_logprobs"):
        raise ConfigError(
            f"{teacher!r} gives no log-probabilities.",
            field="teacher",
            hint="Pass await service.create_sampling_client(base_model=...).",
        )
    vocab = teacher.model_info.vocab_size
    most = min(MOST_ALTERNATIVES, vocab)
    if type(top_k) is not int or not 1 <= top_k <= most:
        hint = f"1 to {most}; {teacher.base_model} knows {vocab} tokens."
        raise ConfigError(f"is {top_k!r}.", field="top_k", hint=hint)


async def soft_targets(
    teacher: AsyncSamplingClient,
    tokens: Sequence[int],
    asked: npt.NDArray[np.bool_],
    *,
    top_k: int,
) -> tuple[SoftTargets, npt.NDArray[np.float64]]:
    """What the teacher says of each place of the text that is asked for.

    Args:
        tokens: the text, T of them, as the teacher reads it.
        asked: [T]; N of them are true. Of the first token, which nothing precedes, there is no
            word: its weight is 0.

    Returns:
        The targets, of weight 1, and the log-probability [N] of the token that stands there.

    Raises:
        InvalidRequestError: it answered in another shape, NaN, or more than a probability of 1.
    """
    answer = await teacher.compute_logprobs(ModelInput.from_ints(tokens), top_k=top_k)
    top, own = answer.prompt_top_logprobs, answer.prompt_logprobs
    if top is None or own is None or len(own) != len(tokens):
        raise _refused(f"scored {len(own or ())} of {len(tokens)} tokens.")
    ids = np.array(top.tokens, dtype=np.int64)
    logprobs = np.array(top.logprobs, dtype=np.float64)
    shape = (len(tokens), top_k)
    if ids.shape != shape or logprobs.shape != shape:
        raise _refused(f"gave the shapes {ids.shape} and {logprobs.shape}, not {shape}.")
    ids[0], logprobs[0] = np.arange(top_k), -np.log(top_k + 1)
    weights = np.ones(len(tokens))
    weights[0] = 0.0
    sums = np.exp(logprobs).sum(1)
    wrong = ~(np.isfinite(logprobs).all(1) & (sums < 1 + ROUNDING))
    wrong |= (np.diff(np.sort(ids, 1)) == 0).any(1) | (ids < 0).any(1)
    if (wrong & asked).any():
        place = int(np.argmax(wrong & asked))
        raise _refused(f"gave no {top_k} probabilities at token {place}: {logprobs[place]}.")
    found = np.array([0.0 if one is None else one for one in own])
    return SoftTargets(ids[asked], logprobs[asked], weights[asked]), found[asked]


def _refused(message: str) -> InvalidRequestError:
    hint = "A sampling client is asked by compute_logprobs(text, top_k=)."
    return InvalidRequestError(message, field="teacher", hint=hint)


SoftLoss = Callable[[object, Sequence["torch.Tensor"]], tuple["torch.Tensor", dict[str, float]]]


def soft_loss(
    targets: Sequence[SoftTargets],
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    denominator: float | None = None,
) -> SoftLoss:
    """For `forward_backward_custom` with the datums of these targets: Σ w·D / denominator.

    Args:
        denominator: None: Σ w, and 1 where that is 0.

    Its metrics are means over the places: `agreement`, how often the student's likeliest of the K
    is the teacher's, and the probability that the K leave over: `teacher_rest`, `student_rest`.
    """
    kept = [np.flatnonzero(one.weights) for one in targets]
    logprobs = np.concatenate([t.logprobs[i] for t, i in zip(targets, kept, strict=True)])
    weights = np.concatenate([t.weights[i] for t, i in zip(targets, kept, strict=True)])
    total = float(weights.sum() or 1.0) if denominator is None else denominator

    def compute(_: object, found: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        student = torch.cat([lp[torch.from_numpy(i)] for lp, i in zip(found, kept, strict=True)])
        teacher = torch.from_numpy(logprobs)
        apart = divergence(student, teacher, beta=beta, temperature=temperature)
        loss = (apart * torch.from_numpy(weights)).sum() / total
        now = student.detach().double().where(teacher > -torch.inf, -torch.inf)
        metrics = {
            "agreement": float((now.argmax(-1) == teacher.argmax(-1)).double().mean()),
            "teacher_rest": float(1 - teacher.exp().sum(-1).mean()),
            "student_rest": float(1 - now.exp().sum(-1).mean()),
        }
        return loss, metrics if len(weights) else {}

    return compute


def divergence(
    student_N_K: torch.Tensor,
    teacher_N_K: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """[N], float64: how far q, the student, is from p, the teacher, over K tokens and their rest.

    The generalised Jensen-Shannon divergence β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q
    (Agarwal et al., GKD, arXiv:2306.13649, equation 1); at its ends what it tends to when divided
    by its weight: β = 0 is the forward KL(p ‖ q) (Hinton et al., arXiv:1503.02531), β = 1 the
    reverse KL(q ‖ p) (Gu et al., MiniLLM, arXiv:2306.08543).

    The probability that the K leave over counts as one more token (Tail-Aware OPD,
    arXiv:2608.14728): with both renormalised over the K nothing holds the student's rest back.

    Args:
        student_N_K: log-probabilities of the K tokens, differentiable.
        teacher_N_K: the teacher's; −inf leaves a token to the rest of both.
        temperature: divides the logits of both, among the K; the rest keeps its probability. The
            loss is not multiplied by its square, as Hinton's is.
    """
    import torch

    q, p = (
        _with_rest(lp.double().where(teacher_N_K > -torch.inf, -torch.inf), temperature)
        for lp in (student_N_K, teacher_N_K)
    )
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    m = torch.logaddexp(p + np.log(beta), q + np.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _with_rest(logprobs_N_K: torch.Tensor, temperature: float) -> torch.Tensor:
    """[N, K + 1]"""
    import torch

    known = logprobs_N_K.logsumexp(-1, keepdim=True)
    rest = (-known.expm1()).clamp(min=FLOOR).log()
    tempered = known + (logprobs_N_K / temperature).log_softmax(-1)
    return torch.cat([tempered, rest], -1).clamp(min=LOWEST)


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one.exp() * (one - other)).sum(-1)
