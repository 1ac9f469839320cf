"""Log-probabilities of target tokens (and entropies), exact over large vocabularies.

The trainer asks `target_scores`, which goes through the rows in chunks, so that a [T, V] array
never exists for a whole batch; sampler and trainer share `token_scores`. Rows may have K targets.

`torch.log_softmax` and `torch.softmax` add the V exponentials of a row in a few running sums, which
costs up to 1e-4 nats at V = 262,144 where logits spread as in real models. `torch.sum` adds in a
tree and costs 3e-7, so here the exponentials are made first and then summed. On a CPU this is done
for some rows at a time that stay in the cache: at [256, 32k] and [32, 262k] forward and backward
take 0.35 to 0.71 of the time of torch's functions over all rows, and up to twice that time at 32
rows of 32k without an entropy (`python -m tests.benchmarks softmax`). Everything is relative to a
row's largest logit, so that neither a large one nor a low temperature costs digits.

T rows of a batch, H hidden, V vocabulary, C rows of a chunk, N rows of logits, K targets of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from weaver.engine.torch.linear import FrozenLinear
from weaver.engine.torch.memory import LEAST_ROWS
from weaver.engine.torch.models import Head, LoadedModel
from weaver.engine.torch.packing import PackedBatch

Pair = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities, float32 [N] or [N, K] as the targets, and entropies, [N]; in nats."""
CACHED_ELEMENTS = 2**17
"""What one core holds at once: half a MiB in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """float32 [T] in nats; `entropy` is that of the tempered policy, None where not asked."""

    logprobs: torch.Tensor
    """[T, K] where rows have several targets."""
    entropy: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Scores:
        entropy = None if self.entropy is None else self.entropy[start:stop]
        return Scores(self.logprobs[start:stop], entropy)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queries:
    """What is asked of each row, all [T]."""

    targets: torch.Tensor
    """int64; [T, K] where rows have several, those of fewer filled up with -1."""
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
            targets=self.targets[rows], temperature=self.temperature[rows], active=self.active[rows]
        )


def target_scores(
    model: LoadedModel,
    hidden: torch.Tensor,
    batch: PackedBatch,
    *,
    queries: Queries,
    chunk: int,
    entropy: bool,
    entropy_gradient: bool = False,
) -> Scores:
    """Log-probabilities of the targets under `hidden` [T, H]; differentiable on active rows.

    Without `entropy_gradient` the entropy is a constant. At most `chunk` logits are there at once,
    or those of `LEAST_ROWS`.
    """
    head = model.head
    trained = torch.tensor(
        [model.trainable or (a is not None and head.path in a.pairs) for a in batch.adapters]
    )
    sequence = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
    general = trained[sequence] | entropy_gradient
    if queries.targets.ndim == 2:
        general |= queries.targets[:, 1].cpu() >= 0
        queries = replace(queries, targets=queries.targets.clamp(min=0))
    active = queries.active.cpu() & torch.is_grad_enabled()
    pieces: list[Pair] = []
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
                of = sequence[rows]
                pieces.append(_general(model, h, of, batch, asked, chunk=chunk, entropy=entropy))
            else:
                assert isinstance(head.linear, FrozenLinear)
                pieces.append(_frozen(h, head, asked, chunk, entropy))
    logprobs, entropies = _joined(pieces)
    if len(order) > 1:
        back = torch.argsort(torch.cat(order)).to(hidden.device)
        logprobs, entropies = logprobs[back], entropies[back]
    if not entropy_gradient:
        entropies = entropies.detach()
    return Scores(logprobs, entropies if entropy else None)


def _general(
    model: LoadedModel,
    hidden: torch.Tensor,
    sequence: torch.Tensor,
    batch: PackedBatch,
    queries: Queries,
    *,
    chunk: int,
    entropy: bool,
) -> Pair:
    """For a trained head, or several targets: chunks that are computed again in the backward pass.

    What fits a quarter of a chunk is kept after all: there the time counts, not the memory.
    `sequence` int64 [N] says of which sequence of the batch each row is.
    """

    def score(h: torch.Tensor, of: torch.Tensor, asked: Queries) -> Pair:
        lengths = torch.bincount(of, minlength=len(batch.lengths)).tolist()
        with model.routing.of(lengths, batch.adapters):
            logits = model.head.logits(h)
        return scored(logits, asked.targets, asked.divisor, entropy)

    if len(hidden) * model.info.vocab_size <= chunk // 4:
        return score(hidden, sequence, queries)
    pieces: list[Pair] = []
    for rows in _chunks(len(hidden), model.info.vocab_size, chunk):
        some = hidden[rows], sequence[rows], queries.take(rows)
        pieces.append(checkpoint(score, *some, use_reentrant=False, preserve_rng_state=False))
    return _joined(pieces)


def _joined(pieces: Sequence[Pair]) -> Pair:
    logprobs, entropies = (torch.cat(values) for values in zip(*pieces, strict=True))
    return logprobs, entropies


class _FrozenHead(torch.autograd.Function):
    """For a frozen head: [N, H] -> log-probabilities and entropies.

    The forward pass also computes g_t = d lp_t / d h_t = (1[target] - softmax) W / temperature, so
    that the backward pass is a product by rows and nothing is computed twice. Where a gradient is
    wanted each row has one target, the first.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, queries: Queries, chunk: int, entropy: bool
    ) -> Pair:
        linear = head.linear
        assert isinstance(linear, FrozenLinear)
        logprobs = torch.empty(queries.targets.shape, dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), linear.out_features, chunk):
            logits = head.finish(linear.projection.project(hidden[rows]).float())
            asked = queries.take(rows)
            targets, temperature = asked.targets, asked.divisor
            p = None if gradient is None else torch.empty_like(logits)
            logprobs[rows], entropies[rows] = token_scores(
                logits, targets, temperature, entropy=entropy, policy=p
            )
            if gradient is not None and p is not None:
                first = targets if targets.ndim == 1 else targets[:, 0]
                p.neg_()[torch.arange(len(p)), first] += 1
                if temperature is not None:
                    p.div_(temperature)
                d_z = head.finish_back(p, logits).to(hidden.dtype)
                gradient[rows] = linear.projection.project_back(d_z)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, g_logprobs: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        first = g_logprobs[:, None] if g_logprobs.ndim == 1 else g_logprobs[:, :1]
        return gradient * first.to(gradient.dtype), None, None, None, None


_frozen: Callable[..., Pair] = _FrozenHead.apply


def _chunks(rows: int, vocab_size: int, chunk: int) -> Iterator[slice]:
    size = max(chunk // vocab_size, LEAST_ROWS)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def token_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None = None,
    *,
    entropy: bool = False,
    policy: torch.Tensor | None = None,
) -> Pair:
    """Log-probabilities of `targets`, and entropies, as a `Pair`; no gradient.

    Args:
        logits: float32 [N, V].
        targets: int64 [N] or [N, K].
        temperature: float32 [N, 1] by which they are divided; None is 1.
        entropy: whether it is asked for; zeros where not.
        policy: float32 [N, V], filled with the probabilities.
    """
    columns = targets.reshape(len(targets), -1)
    logprobs = logits.new_empty(columns.shape)
    entropies = logits.new_zeros(len(logits))
    for rows in _blocks(logits):
        shifted = _shift(logits, temperature, rows)
        chosen = shifted.gather(1, columns[rows])
        kept = None if entropy else shifted
        weights = torch.exp(shifted, out=kept if policy is None else policy[rows])
        total = weights.sum(-1, keepdim=True)
        log_total = total.double().log()
        logprobs[rows] = (chosen - log_total).float()
        if entropy:
            mean = shifted.mul_(weights).sum(-1, keepdim=True).double() / total
            entropies[rows] = (log_total - mean).squeeze(1).float()
        if policy is not None:
            weights.div_(total)
    return logprobs.view(targets.shape), entropies


class _Scored(torch.autograd.Function):
    """`token_scores`, differentiable; of [N, V] only the logits are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
        entropy: bool,
    ) -> Pair:
        logprobs, entropies = token_scores(logits, targets, temperature, entropy=entropy)
        ctx.save_for_backward(logits, targets, temperature, entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, g_logprobs: torch.Tensor, g_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """d lp / d z = (1[target] - p) / temperature; d H / d z = -p (log p + H) / temperature."""
        logits, targets, temperature, entropies = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        columns, g_columns = (x.reshape(len(logits), -1) for x in (targets, g_logprobs))
        for rows in _blocks(logits):
            g = g_columns[rows].sum(-1, keepdim=True)
            shifted = _shift(logits, temperature, rows)
            p = torch.exp(shifted, out=gradient[rows])
            total = p.sum(-1, keepdim=True)
            p.div_(total)
            if g_entropies is None:
                p.mul_(-g)
            else:
                log_p = shifted.sub_(total.log() - entropies[rows, None])
                p.mul_(log_p.mul_(-g_entropies[rows, None]).sub_(g))
            p.scatter_add_(1, columns[rows], g_columns[rows])
            if temperature is not None:
                p.div_(temperature[rows])
        return gradient, None, None, None


scored: Callable[..., Pair] = _Scored.apply
"""A function of (logits, targets, temperature, entropy), as in `token_scores`."""


def top_scores(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens of logits [N, V], likeliest first, and their log-probabilities.

    int64 and float32, [N, count] each.
    """
    tokens = logits.topk(count).indices
    return tokens, token_scores(logits, tokens)[0]


def _shift(logits: torch.Tensor, temperature: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """(z - max z) / temperature of some rows, a new tensor."""
    z = logits[rows]
    shifted = z - z.amax(-1, keepdim=True)
    return shifted if temperature is None else shifted.div_(temperature[rows])


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    count, size = logits.shape
    step = count
    if logits.device.type == "cpu":
        step = max(CACHED_ELEMENTS * torch.get_num_threads() // size, 1)
    for start in range(0, count, step):
        yield slice(start, start + step)
