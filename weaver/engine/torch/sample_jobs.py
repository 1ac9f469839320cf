"""`RunningJob`, `Prompt` and `Row`: a sample job and its samples while `TorchSampler` runs them."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from weaver.checks import check_length
from weaver.engine.base import SampleJob
from weaver.engine.torch.grammars import Guide
from weaver.engine.torch.kv_cache import Cached, KVCache
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.prefixes import Owner
from weaver.engine.torch.prompt_scores import PromptScores
from weaver.engine.torch.sampling import counts_tokens, stream_keys
from weaver.engine.torch.text import Draft, Stops, Top
from weaver.errors import NonFiniteError, WeaverError
from weaver.types import SampleDelta, SampleResult


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt while it is read and samples are to begin; jobs that have the same share it."""

    tokens: list[int]
    owner: Owner
    model: LoadedModel
    cache: KVCache[Any, Any, Any]
    """That of the model."""
    read: int = 0
    """Tokens that the model has seen."""
    cached: Cached | None = None
    """Their keys and values, once it is begun."""
    logits: torch.Tensor | None = None
    """float32 [1, V] behind it, once it is read; of a scalar head [1, 1], the score."""
    scores: PromptScores | None = None
    """Of its places, where they are wanted."""
    jobs: int = 0
    """That need it."""
    marks: list[int] = field(init=False)
    """What stands for the tokens up to each whole block's end, and hardly ever for others."""

    def __post_init__(self) -> None:
        block = self.cache.block_tokens
        ends = range(block, len(self.tokens) + 1, block)
        blocks = (hash(tuple(self.tokens[end - block : end])) for end in ends)
        self.marks = list(accumulate(blocks, lambda mark, each: hash((mark, each))))

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read

    @property
    def size_bytes(self) -> int:
        """What it takes of the cache."""
        return self.cache.prompt_bytes(len(self.tokens))


class RunningJob:
    """A job from `add` to its result. Its samples begin in order, as places become free.

    Raises:
        ContextLengthError: the prompt leaves no room for a token.
        UnsupportedError: the model has no tokenizer to make text with.
    """

    def __init__(self, job: SampleJob, prompt: Prompt) -> None:
        model = prompt.model
        length, context = len(prompt.tokens), model.info.context_length
        check_length(length, context, field="prompt", max_new_tokens=int(job.num_samples > 0))
        self.job = job
        self.model = model
        self.weights = prompt.owner.weights
        self.prompt = prompt
        self.length = min(job.params.max_tokens, context - length)
        """The most tokens of a sample."""
        self.admitted = False
        self.places = 0
        """Rows that the job may have at once."""
        self.running = 0
        self.begun = 0
        self.deltas: list[SampleDelta] = []
        self.has_prompt = False
        """Whether it counts as one that needs the prompt; the reader's own."""
        self.error: WeaverError | None = None
        self._drafts: list[Draft] = []
        self._guide: Guide | None = None
        """That of its samples at their beginning."""
        if job.num_samples:
            facts = model.facts
            ends = model.eos_token_ids | facts.end_token_ids
            stops = Stops.of(job.params, facts.tokenizer, ends=ends)
            if job.params.structured:
                ends = frozenset() if job.params.ignore_eos else ends
                self._guide = facts.grammars.guide(job.params, ends=ends)
            self._drafts = [
                Draft(facts.tokenizer, stops, index=i, length=self.length, stream=job.stream)
                for i in range(job.num_samples)
            ]
        seed = job.params.seed
        self._keys = stream_keys(
            secrets.randbits(63) if seed is None else seed, job.num_samples
        ).tolist()
        self.row_bytes = prompt.cache.row_bytes(length, self.length)
        """The most that one row takes of the cache beside the prompt."""

    @property
    def needs_prompt(self) -> bool:
        """Whether it is still to be read, or samples to begin behind it."""
        return bool(self.pending or self.prompt.unread)

    @property
    def holds_prompt(self) -> bool:
        """Whether what the prompt takes of the cache is kept for it, once it is admitted."""
        return self.needs_prompt or self.prompt.cache.rows_hold_prompts

    @property
    def pending(self) -> int:
        """Samples that have not begun."""
        return self.job.num_samples - self.begun

    @property
    def done(self) -> bool:
        return not (self.needs_prompt or self.running)

    def begin(self, count: int, logits: torch.Tensor) -> list[Row]:
        """The next `count` samples, behind the prompt's `logits`."""
        first, self.begun = self.begun, self.begun + count
        self.running += count
        rows = [Row(self, self._drafts[i], self._keys[i]) for i in range(first, self.begun)]
        if self._guide is not None:
            for row in rows:
                row.guide = self._guide.copy()
        if self.job.params.repetition_penalty != 1:
            for row in rows:
                row.seen = torch.zeros_like(logits[0], dtype=torch.bool)
                row.seen[self.prompt.tokens] = True
        if counts_tokens(self.job.params):
            for row in rows:
                row.counts = torch.zeros_like(logits[0])
        return rows

    def check_scores(self) -> None:
        """Fails the job if a log-probability of its prompt, or the score, is not finite."""
        scores, score = self.prompt.scores, self._score
        if (scores and not scores.finite) or not (score is None or math.isfinite(score)):
            self.error = _not_finite("in the prompt")

    @property
    def _score(self) -> float | None:
        logits = self.prompt.logits
        return float(logits) if self.job.score and logits is not None else None

    def take(
        self, row: Row, token: int, *, logprob: float, sampling_logprob: float, top: Top | None
    ) -> None:
        """Adds a drawn token to a row, which may end it, or fail the job."""
        if not (math.isfinite(logprob) and math.isfinite(sampling_logprob)):
            at = f"at sample {row.draft.index}, token {len(row.draft.logprobs)}"
            self.error = _not_finite(at)
            return
        try:
            last = row.guide is not None and not row.guide.take(token)
        except WeaverError as error:
            self.error = error
            return
        self.deltas += row.draft.take(
            token, logprob=logprob, sampling_logprob=sampling_logprob, top=top, last=last
        )
        if row.seen is not None:
            row.seen[token] = True
        if row.counts is not None:
            row.counts[token] += 1
        if row.draft.ended:
            self.running -= 1
            self.places = min(self.places, self.running + self.pending)

    def result(self) -> SampleResult:
        """Once it is done."""
        version, scores = self.weights.version, self.prompt.scores
        return SampleResult(
            sequences=tuple(draft.sequence(version=version) for draft in self._drafts),
            prompt_tokens=tuple(self.prompt.tokens),
            prompt_logprobs=scores and scores.logprobs,
            prompt_top_logprobs=scores and scores.top,
            prompt_target_logprobs=scores and scores.targets,
            score=self._score,
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
    counts: torch.Tensor | None = None
    """float32 [V]: how often the continuation has each; None without a penalty of that."""
    guide: Guide | None = None
    """What may follow; None without a schema or a grammar."""


def _not_finite(where: str) -> NonFiniteError:
    return NonFiniteError(
        f"the weights give logits that are not finite {where}.",
        hint="Sample from an earlier checkpoint, and train with a smaller learning rate.",
    )
