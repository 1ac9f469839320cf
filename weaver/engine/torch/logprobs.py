"""Log-probabilities of target tokens (and entropies), in chunks of rows; called by the trainer.

A [T, V] array never exists for a whole batch. T rows, H hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from weaver.engine.torch.linear import FrozenLinear
from weaver.engine.torch.softmax import scored, token_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weaver.engine.torch.models import Head, LoadedModel
    from weaver.engine.torch.packing import PackedBatch

CHUNK_ELEMENTS = 2**23
"""C·V of a chunk: 32 MiB in float32."""
KEPT_ELEMENTS = 2**21
"""Logits of a whole pass that are kept for the backward pass: 8 MiB in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """float32 [T] in nats; `entropy` is that of the tempered policy, None where not asked."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Scores:
        entropy = None if self.entropy is None else self.entropy[start:stop]
        return Scores(self.logprobs[start:stop], entropy)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queries:
    """What is asked of each row, all [T]."""

    targets: torch.Tensor
    """int64"""
    temperature: torch.Tensor
    """float32; the logits are divided by it."""
    active: torch.Tensor
    """bool: rows whose gradient is wanted; the others are scored without one."""

    @property
    def divisor(self) -> torch.Tensor | None:
        """`temperature` [T, 1], or None where it is 1 everywhere."""
        return self.temperature[:, None] if bool((self.temperature != 1).any()) else None

    def take(self, rows: torch.Tensor | slice) -> Queries:
        return Queries(
            targets=self.targets[rows],
            temperature=self.temperature[rows],
            active=self.active[rows],
        )


def target_scores(
    model: LoadedModel,
    hidden: torch.Tensor,
    batch: PackedBatch,
    *,
    queries: Queries,
    entropy: bool,
    entropy_gradient: bool = False,
) -> Scores:
    """Log-probabilities of the targets under `hidden` [T, H]; differentiable on active rows.

    Without `entropy_gradient` the entropy is a constant.
    """
    head = model.head
    trained = torch.tensor(
        [model.trainable or (a is not None and head.path in a.pairs) for a in batch.adapters]
    )
    sequence = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
    general = trained[sequence] | entropy_gradient
    active = queries.active.cpu() & torch.is_grad_enabled()
    pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
    order: list[torch.Tensor] = []
    for with_gradient, in_general in ((a, b) for a in (True, False) for b in (True, False)):
        rows = torch.nonzero((active == with_gradient) & (general == in_general)).squeeze(1)
        if not len(rows):
            continue
        order.append(rows)
        some = len(rows) < len(hidden)
        h = hidden[rows.to(hidden.device)] if some else hidden
        asked = queries.take(rows.to(hidden.device)) if some else queries
        with torch.set_grad_enabled(with_gradient):
            if in_general:
                counts = torch.bincount(sequence[rows], minlength=len(batch.lengths)).tolist()
                pieces.append(_general(model, h, counts, batch, asked, entropy=entropy))
            else:
                assert isinstance(head.linear, FrozenLinear)
                pieces.append(_frozen(h, head, asked, entropy))
    logprobs, entropies = (torch.cat(values) for values in zip(*pieces, strict=True))
    if len(order) > 1:
        back = torch.argsort(torch.cat(order)).to(hidden.device)
        logprobs, entropies = logprobs[back], entropies[back]
    if not entropy_gradient:
        entropies = entropies.detach()
    return Scores(logprobs, entropies if entropy else None)


def _general(
    model: LoadedModel,
    hidden: torch.Tensor,
    counts: list[int],
    batch: PackedBatch,
    queries: Queries,
    *,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For a trained head: chunks, each computed again in the backward pass instead of kept.

    What fits `KEPT_ELEMENTS` is kept after all: there the time counts, not the memory.
    """

    def score(h: torch.Tensor, lengths: list[int], asked: Queries) -> tuple[torch.Tensor, ...]:
        with model.routing.of(lengths, batch.adapters):
            logits = model.head.logits(h)
        return scored(logits, asked.targets, asked.divisor, entropy)

    if len(hidden) * model.info.vocab_size <= KEPT_ELEMENTS:
        logprobs, entropies = score(hidden, counts, queries)
        return logprobs, entropies
    pieces: list[tuple[torch.Tensor, ...]] = []
    for rows in _chunks(len(hidden), model.info.vocab_size):
        asked = queries.take(rows)
        lengths = _lengths_within(counts, rows)
        pieces.append(
            checkpoint(
                score, hidden[rows], lengths, asked, use_reentrant=False, preserve_rng_state=False
            )
        )
    logprobs, entropies = (torch.cat(values) for values in zip(*pieces, strict=True))
    return logprobs, entropies


class _FrozenHead(torch.autograd.Function):
    """For a frozen head: [N, H] -> log-probabilities and entropies [N].

    The forward pass also computes g_t = d lp_t / d h_t = (1[target] - softmax) W / temperature, so
    that the backward pass is a product by rows and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, queries: Queries, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        linear = head.linear
        assert isinstance(linear, FrozenLinear)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), linear.out_features):
            logits = head.finish(linear.project(hidden[rows]).float())
            asked = queries.take(rows)
            targets, temperature = asked.targets, asked.divisor
            p = None if gradient is None else torch.empty_like(logits)
            logprobs[rows], entropies[rows] = token_scores(
                logits, targets, temperature, entropy=entropy, policy=p
            )
            if gradient is not None and p is not None:
                p.neg_()[torch.arange(len(p)), targets] += 1
                if temperature is not None:
                    p.div_(temperature)
                d_z = head.finish_back(p, logits).to(hidden.dtype)
                gradient[rows] = linear.project_back(d_z)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, g_logprobs: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * g_logprobs[:, None].to(gradient.dtype), None, None, None


_frozen: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _FrozenHead.apply


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    size = max(CHUNK_ELEMENTS // vocab_size, 16)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _lengths_within(counts: list[int], rows: slice) -> list[int]:
    """How many of `rows` fall to each sequence, whose rows lie end to end."""
    lengths: list[int] = []
    start = 0
    for count in counts:
        stop = start + count
        lengths.append(max(min(stop, rows.stop) - max(start, rows.start), 0))
        start = stop
    return lengths
