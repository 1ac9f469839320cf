"""Drawing tokens from logits, as pure functions; called by `TorchSampler` at every step.

Shapes: B rows, V vocabulary, F rows of one kind, K candidates of a row. Every row has its own
parameters and its own uniform number, so what a row draws never depends on its neighbours. The
order is: logit bias, repetition penalty, frequency and presence penalty, what a grammar allows,
temperature, top-k, top-p, min-p. Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from weaver.types import SamplingParams

CANDIDATES = 256
"""Likeliest tokens that are sorted before the whole vocabulary is: of 32k, a tenth of the time."""
BLOCK = 128

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False)
class RowParams:
    """`SamplingParams` of B rows as tensors. The three kinds of rows make up all of them."""

    temperature: torch.Tensor
    """float32 [B, 1]; 1 for greedy rows."""
    top_k: torch.Tensor
    """int64 [B, 1]; V is off."""
    top_p: torch.Tensor
    """float64 [B, 1]; infinity is off."""
    min_p: torch.Tensor
    """float32 [B, 1]"""
    penalty: torch.Tensor
    """float32 [B, 1], of tokens that were seen."""
    presence: torch.Tensor
    """float32 [B, 1]"""
    frequency: torch.Tensor
    """float32 [B, 1]"""
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Of N biases the rows and the tokens, int64 [N], and the values, float32 [N]."""
    plain_rows: torch.Tensor
    """int64: rows drawn from the whole vocabulary, or from what min-p leaves of it."""
    sorted_rows: torch.Tensor
    """int64: rows with top-k or top-p."""
    greedy_rows: torch.Tensor
    """int64: rows at temperature 0."""
    penalised_rows: torch.Tensor
    """int64: rows with a repetition penalty, of any kind."""
    counted_rows: torch.Tensor
    """int64: rows with a presence or frequency penalty, of any kind."""
    guided_rows: torch.Tensor
    """int64: rows whose text keeps to a schema or a grammar, of any kind."""
    tempered: bool
    """Whether a temperature is not 1; known here, so that no draw waits for the device to tell."""
    has_min_p: bool


class Draws(NamedTuple):
    tokens: torch.Tensor
    """int64 [B]"""
    logprobs: torch.Tensor
    """float32 [B]: of the policy, that is the log-softmax of the logits as they came."""
    sampling_logprobs: torch.Tensor
    """float32 [B]: of the distribution drawn from; 0 for greedy rows, which have one outcome."""


def row_params(
    params: Sequence[SamplingParams], vocab_size: int, *, device: torch.device
) -> RowParams:
    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    def index(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def rows(of: torch.Tensor) -> torch.Tensor:
        return of[:, 0].nonzero()[:, 0]

    temperature = column([p.temperature for p in params], torch.float32)
    top_k = column([p.top_k if p.top_k > 0 else vocab_size for p in params], torch.int64)
    top_p = column([p.top_p if p.top_p < 1 else torch.inf for p in params], torch.float64)
    penalty = column([p.repetition_penalty for p in params], torch.float32)
    greedy = temperature == 0
    tempered = any(p.temperature not in (0, 1) for p in params)
    penalised = [i for i, p in enumerate(params) if p.repetition_penalty != 1]
    counted = [i for i, p in enumerate(params) if counts_tokens(p)]
    guided = [i for i, p in enumerate(params) if p.structured]
    biases = [(i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias]
    row, token, value = zip(*biases, strict=True) if biases else ((), (), ())
    filtered = ~greedy & ((top_k < vocab_size) | (top_p < 1))
    return RowParams(
        temperature=temperature.masked_fill(greedy, 1),
        top_k=top_k.clamp(max=vocab_size),
        top_p=top_p,
        min_p=column([p.min_p for p in params], torch.float32),
        penalty=penalty,
        presence=column([p.presence_penalty for p in params], torch.float32),
        frequency=column([p.frequency_penalty for p in params], torch.float32),
        bias=(index(row), index(token), column(value, torch.float32)[:, 0]) if biases else None,
        plain_rows=rows(~greedy & ~filtered),
        sorted_rows=rows(filtered),
        greedy_rows=rows(greedy),
        penalised_rows=index(penalised),
        counted_rows=index(counted),
        guided_rows=index(guided),
        tempered=tempered,
        has_min_p=any(p.min_p > 0 for p in params),
    )


def sample(
    logits: torch.Tensor,
    params: RowParams,
    *,
    uniforms: torch.Tensor,
    seen: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
) -> Draws:
    """Draws one token for each row by inverting its cumulative distribution.

    `logits` [B, V] float32; `uniforms` [B] float64 in [0, 1); for rows that need it `seen`, bool
    [penalised rows, V], the tokens of prompt and continuation so far, `counts`, float32
    [counted rows, V], how often the continuation has each, and `allowed`, bool [guided rows, V].
    """
    policy = logits.softmax(-1)
    scaled = shift(logits, params, seen=seen, counts=counts)
    if len(params.guided_rows):
        assert allowed is not None
        left = scaled[params.guided_rows].masked_fill(~allowed, -torch.inf)
        scaled = scaled.index_copy(0, params.guided_rows, left)
    if params.tempered:
        # the likeliest becomes 0 first, so that no temperature overflows
        scaled = scaled.sub(scaled.amax(-1, keepdim=True)).div_(params.temperature)
    weights = policy if scaled is logits else scaled.softmax(-1)
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    sampling_logprobs = logits.new_zeros(len(logits))
    everything = _Rows(
        weights, params.top_k, params.top_p, params.min_p, uniforms, params.has_min_p
    )
    for rows, draw in ((params.plain_rows, _draw_plain), (params.sorted_rows, _draw_sorted)):
        if len(rows):
            some = everything if len(rows) == len(logits) else everything.take(rows)
            tokens[rows], sampling_logprobs[rows] = draw(some)
    if len(params.greedy_rows):
        tokens[params.greedy_rows] = scaled[params.greedy_rows].argmax(-1)
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    # a softmax's largest value is 1 / Σ exp(z - max z), all that is missing of the log-softmax;
    # torch divides by a sum that is up to 1e-4 off, so that only a second sum makes it exact
    share = policy.amax(-1) / policy.sum(-1)
    return Draws(tokens, chosen - logits.amax(-1) + share.log(), sampling_logprobs)


def shift(
    logits: torch.Tensor,
    params: RowParams,
    *,
    seen: torch.Tensor | None,
    counts: torch.Tensor | None,
) -> torch.Tensor:
    """[B, V] with biases and penalties; the very same where no row has any. See `sample`.

    Frequency and presence penalty are taken off once for each time that the continuation has a
    token, and once if it has it.
    """
    if params.bias is not None:
        biased, tokens, values = params.bias
        logits = logits.index_put((biased, tokens), values, accumulate=True)
    if len(rows := params.penalised_rows):
        assert seen is not None
        logits = logits.index_copy(0, rows, penalise(logits[rows], seen, params.penalty[rows]))
    if len(rows := params.counted_rows):
        assert counts is not None
        off = params.frequency[rows] * counts + params.presence[rows] * (counts > 0)
        logits = logits.index_copy(0, rows, logits[rows] - off)
    return logits


def counts_tokens(params: SamplingParams) -> bool:
    """Whether a row needs `counts`."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Keskar et al., arXiv:1909.05858, section 4.1, made to lower negative logits as well.

    Logits of `seen` tokens are divided by the penalty where positive and multiplied where negative.
    `logits` and `seen` [F, V], `penalty` [F, 1].
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def stream_keys(seed: int, num_samples: int) -> npt.NDArray[np.uint64]:
    """One key for each sample of a request; sample i's is the same for any `num_samples` > i."""
    root = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)
    return _mix(root + np.arange(1, num_samples + 1, dtype=np.uint64) * _GOLDEN)


def draw_uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> torch.Tensor:
    """Number `positions[i]` of stream `keys[i]`: float64 [B] in [0, 1), a pure function of both.

    SplitMix64 (Steele, Lea and Flood, doi:10.1145/2660193.2660195) read as a counter.
    """
    bits = _mix(keys + (positions + np.uint64(1)) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Rows(NamedTuple):
    """Some rows, and what their draw depends on; see `RowParams` and `sample`."""

    weights: torch.Tensor
    """float32 [F, V]: probabilities but for a factor."""
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniforms: torch.Tensor
    has_min_p: bool

    def take(self, rows: torch.Tensor) -> _Rows:
        return _Rows(
            self.weights[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.uniforms[rows],
            self.has_min_p,
        )


def _draw_plain(rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities [F]."""
    weights, min_p = rows.weights, rows.min_p
    if rows.has_min_p:
        weights = weights.masked_fill(weights < min_p * weights.amax(-1, keepdim=True), 0)
    return _invert(weights, rows.uniforms)


def _draw_sorted(rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_draw_plain`, through top-k and top-p.

    Few candidates decide a row if what they keep is likelier than the last of them; the rest is
    sorted whole. Both ways keep the same tokens in the same order, so they draw the same.
    """
    size = rows.weights.shape[-1]
    candidates = min(CANDIDATES, size)
    ids = rows.weights.topk(candidates).indices.sort(-1).values
    tokens, logprobs, decided = _draw_among(ids, rows)
    if candidates < size and not bool(decided.all()):
        rest = (~decided).nonzero()[:, 0]
        ids = torch.arange(size, device=ids.device).expand(len(rest), -1)
        tokens[rest], logprobs[rest], _ = _draw_among(ids, rows.take(rest))
    return tokens, logprobs


def _draw_among(ids: torch.Tensor, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws among the candidates `ids` [F, K], ascending; also says which rows they decide.

    Top-k (Fan et al., arXiv:1805.04833) keeps k tokens. Top-p (Holtzman et al., arXiv:1904.09751)
    keeps the smallest set of likeliest tokens whose share of those reaches p. Min-p (Nguyen et al.,
    arXiv:2407.01082) drops tokens below a share of the likeliest. Of equals, low ids come first.
    """
    weights, top_k, top_p, min_p, uniforms, _ = rows
    values, order = weights.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    running = values.cumsum(-1, dtype=torch.float64)
    total = running.gather(-1, top_k.clamp(max=ids.shape[-1]) - 1)
    whole = weights.sum(-1, keepdim=True, dtype=torch.float64)
    total = torch.where(top_k < weights.shape[-1], total, whole)
    before = running - values
    keep = torch.arange(ids.shape[-1], device=ids.device) < top_k
    keep &= before < top_p * total
    keep &= values >= min_p * values[:, :1]
    keep[:, 0] = True
    last = values.gather(-1, keep.sum(-1, keepdim=True) - 1)
    reached = (top_k <= ids.shape[-1]) | (top_k == weights.shape[-1])
    decided = (reached & (last > values[:, -1:]))[:, 0]
    drawn, logprobs = _invert(values.masked_fill(~keep, 0), uniforms)
    return ids.gather(-1, order.gather(-1, drawn[:, None]))[:, 0], logprobs, decided


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index [F] at which the running sum exceeds that share of the whole, and its log.

    First finds the block, then the index in it: a running sum of all would take most of the time.
    """
    size = weights.shape[-1]
    if size % BLOCK:
        weights = functional.pad(weights, (0, -size % BLOCK))
    blocks = weights.view(len(weights), -1, BLOCK)
    running = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    mass = running[:, -1:]
    block, rest = _locate(running, uniforms[:, None] * mass)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0]
    offset, _ = _locate(inside.cumsum(-1, dtype=torch.float64), rest)
    logprobs = (inside.gather(-1, offset) / mass).log()
    index = (block * BLOCK + offset).clamp(max=size - 1)  # NaN leads anywhere
    return index[:, 0], logprobs[:, 0].float()


def _locate(running: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index [F, 1] whose running sum exceeds `target`, and how far target lies in it."""
    # rounding may lift the target to the last sum, which nothing exceeds
    target = target.minimum(running[:, -1:].nextafter(running.new_zeros(())))
    index = torch.searchsorted(running, target, right=True).clamp_(max=running.shape[-1] - 1)
    before = running.gather(-1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0)
    return index, target - before
