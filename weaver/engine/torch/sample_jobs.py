"""`RunningJob` and `Row`: a sample job and its samples while `TorchSampler` works on them."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Any

import torch

from weaver.checks import check_length
from weaver.engine.base import SampleJob
from weaver.engine.torch.kv_cache import Cached, KVCache
from weaver.engine.torch.models import PublishedWeights
from weaver.engine.torch.sampling import stream_keys
from weaver.engine.torch.text import Draft, Stops
from weaver.errors import NonFiniteError, WeaverError
from weaver.types import SampleDelta, SampleResult


class RunningJob:
    """A job from `add` to its result. Its samples begin in order, as places become free.

    Raises:
        ContextLengthError: the prompt leaves no room for a token.
        UnsupportedError: the model has no tokenizer to make text with.
    """

    def __init__(self, job: SampleJob, weights: PublishedWeights, cache: KVCache[Any, Any]) -> None:
        length, context = len(job.prompt), weights.model.info.context_length
        check_length(length, context, field="prompt", max_new_tokens=int(job.num_samples > 0))
        self.job = job
        self.weights = weights
        self.prompt = list(job.prompt)
        self.length = min(job.params.max_tokens, context - length)
        """The most tokens of a sample."""
        self.read = 0
        """Tokens of the prompt that the model has seen."""
        self.cache = cache
        """That of the model."""
        self.cached: Cached | None = None
        """The prompt's keys and values, while it is read or samples are yet to begin."""
        self.logits: torch.Tensor | None = None
        """float32 [1, V] behind the prompt, while samples are yet to begin."""
        self.admitted = False
        self.places = 0
        """Rows that the job may have at once."""
        self.running = 0
        self.begun = 0
        self.deltas: list[SampleDelta] = []
        self.prompt_logprobs: list[float | None] = [None]
        self.error: WeaverError | None = None
        self._drafts: list[Draft] = []
        if job.num_samples:
            facts = weights.model.facts
            ends = weights.model.eos_token_ids | facts.end_token_ids
            stops = Stops.of(job.params, facts.tokenizer, ends=ends)
            self._drafts = [
                Draft(facts.tokenizer, stops, index=i, length=self.length, stream=job.stream)
                for i in range(job.num_samples)
            ]
        seed = job.params.seed
        self._keys = stream_keys(
            secrets.randbits(63) if seed is None else seed, job.num_samples
        ).tolist()

    @property
    def prompt_bytes(self) -> int:
        """What the prompt takes of the cache."""
        return self.cache.prompt_bytes(len(self.prompt))

    @property
    def row_bytes(self) -> int:
        """The most that one row takes of the cache beside it."""
        return self.cache.row_bytes(len(self.prompt), self.length)

    @property
    def held_bytes(self) -> int:
        """What is kept of the cache for it, once it is admitted."""
        held = self.pending or self.unread or self.cache.rows_hold_prompts
        return (self.prompt_bytes if held else 0) + self.places * self.row_bytes

    @property
    def pending(self) -> int:
        """Samples that have not begun."""
        return self.job.num_samples - self.begun

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the model has not seen."""
        return len(self.prompt) - self.read

    @property
    def done(self) -> bool:
        return not (self.unread or self.pending or self.running)

    def begin(self, count: int, logits: torch.Tensor) -> list[Row]:
        """The next `count` samples, behind the prompt's `logits`."""
        first, self.begun = self.begun, self.begun + count
        self.running += count
        rows = [Row(self, self._drafts[i], self._keys[i]) for i in range(first, self.begun)]
        if self.job.params.repetition_penalty != 1:
            for row in rows:
                row.seen = torch.zeros_like(logits[0], dtype=torch.bool)
                row.seen[self.prompt] = True
        return rows

    def score(self, logprobs: list[float]) -> None:
        """Adds log-probabilities of the prompt's next tokens, which may fail the job."""
        self.prompt_logprobs += logprobs
        if not all(map(math.isfinite, logprobs)):
            self.error = _not_finite("in the prompt")

    def take(self, row: Row, token: int, *, logprob: float, sampling_logprob: float) -> None:
        """Adds a drawn token to a row, which may end it, or fail the job."""
        if not (math.isfinite(logprob) and math.isfinite(sampling_logprob)):
            at = f"at sample {row.draft.index}, token {len(row.draft.logprobs)}"
            self.error = _not_finite(at)
            return
        self.deltas += row.draft.take(token, logprob=logprob, sampling_logprob=sampling_logprob)
        if row.seen is not None:
            row.seen[token] = True
        if row.draft.ended:
            self.running -= 1
            self.places = min(self.places, self.running + self.pending)

    def result(self) -> SampleResult:
        """Once it is done."""
        version, scored = self.weights.version, self.job.include_prompt_logprobs
        return SampleResult(
            sequences=tuple(draft.sequence(version=version) for draft in self._drafts),
            prompt_tokens=tuple(self.prompt),
            prompt_logprobs=tuple(self.prompt_logprobs) if scored else None,
        )


@dataclass(slots=True, eq=False)
class Row:
    """One sample while it runs."""

    job: RunningJob
    draft: Draft
    key: int
    """That of its stream of random numbers."""
    place: Cached = field(init=False)
    """In the cache, from its first token on."""
    seen: torch.Tensor | None = None
    """bool [V]: tokens of prompt and continuation; None without a repetition penalty."""


def _not_finite(where: str) -> NonFiniteError:
    return NonFiniteError(
        f"the weights give logits that are not finite {where}.",
        hint="Sample from an earlier checkpoint, and train with a smaller learning rate.",
    )
