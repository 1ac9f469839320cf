"""Log-probabilities and entropies of logits over large vocabularies; trainer and sampler call it.

`torch.log_softmax` and `torch.softmax` add the V exponentials of a row in a few running sums, which
costs up to 1e-4 nats at V = 262,144 where logits spread as in real models. `torch.sum` adds in a
tree and costs 3e-7, so here the exponentials are made first and then summed. On a CPU this is done
for some rows at a time that stay in the cache: at [256, 32k] and [32, 262k] forward and backward
take 0.35 to 0.71 of the time of torch's functions over all rows, and up to twice that time at 32
rows of 32k without an entropy (`python -m tests.benchmarks softmax`).

N rows, V vocabulary. Everything is relative to a row's largest logit, so that neither a large one
nor a low temperature costs digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHED_ELEMENTS = 2**17
"""Of one core: half a MiB in float32."""


def token_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None = None,
    *,
    entropy: bool = False,
    policy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` [N], and entropies, in nats: float32 [N] each; no gradient.

    Args:
        logits: float32 [N, V].
        temperature: float32 [N, 1] by which they are divided; None is 1.
        entropy: whether it is asked for; zeros where not.
        policy: float32 [N, V], filled with the probabilities.
    """
    logprobs = logits.new_empty(len(logits))
    entropies = torch.zeros_like(logprobs)
    for rows in _blocks(logits):
        shifted = _shift(logits, temperature, rows)
        chosen = shifted.gather(1, targets[rows, None])
        kept = None if entropy else shifted
        weights = torch.exp(shifted, out=kept if policy is None else policy[rows])
        total = weights.sum(-1, keepdim=True)
        log_total = total.double().log()
        logprobs[rows] = (chosen - log_total).squeeze(1).float()
        if entropy:
            mean = shifted.mul_(weights).sum(-1, keepdim=True).double() / total
            entropies[rows] = (log_total - mean).squeeze(1).float()
        if policy is not None:
            weights.div_(total)
    return logprobs, entropies


class _Scored(torch.autograd.Function):
    """`token_scores`, differentiable; of [N, V] only the logits are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        for rows in _blocks(logits):
            g, target = g_logprobs[rows, None], targets[rows, None]
            shifted = _shift(logits, temperature, rows)
            p = torch.exp(shifted, out=gradient[rows])
            total = p.sum(-1, keepdim=True)
            p.div_(total)
            if g_entropies is None:
                p.mul_(-g)
            else:
                log_p = shifted.sub_(total.log() - entropies[rows, None])
                p.mul_(log_p.mul_(-g_entropies[rows, None]).sub_(g))
            p.scatter_add_(1, target, g)
            if temperature is not None:
                p.div_(temperature[rows])
        return gradient, None, None, None


scored: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _Scored.apply
"""Of (logits, targets, temperature, entropy), as in `token_scores`."""


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
