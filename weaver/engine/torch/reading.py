"""`Reader`: reads the prompts of `TorchSampler`'s jobs, each distinct prefix once.

Jobs with the same prompt share one `Prompt`; what others have read or drawn is taken from
`Prefixes`, and a prompt waits for another that is just reading the same tokens. Pieces end where
blocks do, so that a prompt is cut at the same places whatever was there already.

H hidden, T tokens of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from weaver.engine.base import SampleJob
from weaver.engine.torch.kv_cache import KVCache
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.models import LoadedModel, PublishedWeights
from weaver.engine.torch.packing import pack
from weaver.engine.torch.prefixes import Owner, Prefixes
from weaver.engine.torch.prompt_scores import PromptScores
from weaver.engine.torch.sample_jobs import Prompt, Row, RunningJob
from weaver.engine.torch.scalar import last_scores

PIECE_TOKENS = 512
"""One pass has so many: enough rows to keep the matrix products busy, few enough for others to go
on."""
FIXED_PIECE_TOKENS = 256
"""In deterministic mode all pieces have so many but the last, and reuse begins between two."""
LEAST_TOKENS = 16
"""A pass has so many of a prompt at least: few rows take other kernels, whose last bits differ."""
SCORED_ROWS = 64
"""Prompt rows that go through the head at once, so that a [T, V] array never exists."""


class Reader:
    """With `deterministic` a pass has one piece of one prompt, and drawn tokens are not reused.

    So the same calls make the same numbers, whatever was there already and whatever else runs.
    """

    def __init__(self, store: ModelStore, *, piece_tokens: int, deterministic: bool) -> None:
        """`piece_tokens`: of a pass; 0 is what pays."""
        self.prefixes = Prefixes()
        self.prompt_tokens = 0
        """Of all jobs so far."""
        self.reused_tokens = 0
        """Those of them that were not read, as they were there."""
        self._store = store
        self._piece_tokens = piece_tokens
        if not piece_tokens:
            self._piece_tokens = FIXED_PIECE_TOKENS if deterministic else PIECE_TOKENS
        self._deterministic = deterministic
        self._caches: WeakKeyDictionary[LoadedModel, KVCache[Any, Any, Any]] = WeakKeyDictionary()
        self._prompts: dict[tuple[Owner, tuple[int, ...]], Prompt] = {}

    def prompt_of(self, job: SampleJob, weights: PublishedWeights) -> Prompt:
        """The prompt of a job, which may be read already.

        One whose every token is scored is read for itself. Errors: see `ModelStore.base`.
        """
        owner, tokens = Owner(weights, job.tenant), tuple(job.prompt)
        shared = None if job.scores_prompt else self._prompts.get((owner, tokens))
        if shared is not None:
            return shared
        model = self._store.model_of(weights)
        if model not in self._caches:
            self._caches[model] = model.new_cache()
        prompt = Prompt(list(tokens), owner, model, self._caches[model])
        if job.scores_prompt:
            prompt.scores = PromptScores(job)
        return prompt

    def leave(self, model: LoadedModel) -> None:
        """Gives up what was kept of a model that is unloaded."""
        cache = self._caches.pop(model, None)
        if cache is not None:
            self.prefixes.drop_cache(cache)

    def begin(self, job: RunningJob) -> None:
        """Another job needs its prompt."""
        prompt = job.prompt
        self.prompt_tokens += len(prompt.tokens)
        if prompt.jobs:
            self.reused_tokens += len(prompt.tokens)
        elif prompt.scores is None:
            self._prompts[prompt.owner, tuple(prompt.tokens)] = prompt
        prompt.jobs += 1
        job.has_prompt = True

    def end(self, job: RunningJob) -> None:
        """The job does not need its prompt any more, if it still did."""
        prompt = job.prompt
        if not job.has_prompt:
            return
        job.has_prompt = False
        prompt.jobs -= 1
        if not prompt.jobs:
            if prompt.cached is not None:
                prompt.cache.end(prompt.cached)
            prompt.cached = prompt.logits = None
            if prompt.scores is None:
                del self._prompts[prompt.owner, tuple(prompt.tokens)]

    def read(self, unread: Sequence[Prompt], *, limit: int) -> None:
        """Feeds the next tokens of the oldest prompts of one model, up to the token budget.

        `limit`: bytes that prefixes may take.
        """
        parts = self._parts(unread)
        parts.sort(key=lambda part: id(part[0].owner.weights))
        hidden = self._forward(parts)
        ended: list[tuple[Prompt, torch.Tensor]] = []
        rows = torch.split(hidden, [size for _, size in parts])
        for (prompt, size), some in zip(parts, rows, strict=True):
            if prompt.scores is not None:
                _score(prompt, some, prompt.scores)
            prompt.read += size
            if prompt.cached is not None:
                sequence = prompt.cached
                self.prefixes.keep(prompt.owner, prompt.tokens, sequence, prompt.cache, limit=limit)
            if not prompt.unread:
                ended.append((prompt, some[-1]))
        for scalar in (False, True):
            some_ended = [e for e in ended if (e[0].owner.weights.scalar is not None) == scalar]
            if some_ended:
                _end(some_ended, scalar=scalar)

    def keep(self, row: Row, *, limit: int) -> None:
        """Keeps what a sample has drawn, for prompts that go on behind it."""
        prompt, block = row.job.prompt, row.job.prompt.cache.block_tokens
        if not self._deterministic and row.place.length // block > len(prompt.tokens) // block:
            tokens = prompt.tokens + row.draft.tokens
            self.prefixes.keep(prompt.owner, tokens, row.place, prompt.cache, limit=limit)

    def _parts(self, unread: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
        """What is read in the next pass: prompts, and so many tokens of each."""
        parts: list[tuple[Prompt, int]] = []
        left, reading = self._piece_tokens, set[tuple[Owner, int]]()
        for prompt in unread[:1] if self._deterministic else unread:
            if left <= 0 or prompt.model is not unread[0].model:
                continue
            if prompt.cached is None and not self._open(prompt, reading):
                continue
            size = min(left, prompt.unread)
            if prompt.unread - size < LEAST_TOKENS:
                size = prompt.unread
            elif size > (over := (prompt.read + size) % prompt.cache.block_tokens):
                size -= over
            elif parts:
                continue
            marks = prompt.marks[prompt.read // prompt.cache.block_tokens :]
            reading.update((prompt.owner, mark) for mark in marks)
            parts.append((prompt, size))
            left -= size
        return parts

    def _open(self, prompt: Prompt, reading: set[tuple[Owner, int]]) -> bool:
        """Begins a prompt with what is there, unless that is just getting more."""
        found, most, block = [], 0, prompt.cache.block_tokens
        if prompt.scores is None:
            # blocks between two places where reuse may end
            grain = math.lcm(block, self._piece_tokens) // block if self._deterministic else 1
            most = (len(prompt.tokens) - LEAST_TOKENS) // block // grain * grain
            found = self.prefixes.find(prompt.owner, prompt.tokens, prompt.cache, most=most)
            del found[len(found) // grain * grain :]
        if len(found) < most and (prompt.owner, prompt.marks[len(found)]) in reading:
            return False
        prompt.cached = prompt.cache.prompt(len(prompt.tokens), found)
        prompt.read = len(found) * block
        self.reused_tokens += prompt.read
        return True

    def _forward(self, parts: Sequence[tuple[Prompt, int]]) -> torch.Tensor:
        """[T, H] of the next tokens of each prompt."""
        model, cache = parts[0][0].model, parts[0][0].cache
        self._store.turn_to(model)
        return model.hidden_states(
            pack(
                [prompt.tokens[prompt.read : prompt.read + size] for prompt, size in parts],
                adapters=[prompt.owner.weights.adapter for prompt, _ in parts],
                device=model.device,
                starts=[prompt.read for prompt, _ in parts],
                cache=cache.read([(prompt.cached, size) for prompt, size in parts]),
            )
        )


def _end(ended: Sequence[tuple[Prompt, torch.Tensor]], *, scalar: bool) -> None:
    """Prompts that are read, with the hidden state [H] of the last token of each."""
    last = torch.stack([row for _, row in ended])
    weights = [prompt.owner.weights for prompt, _ in ended]
    if scalar:
        logits = last_scores(last, [one.scalar for one in weights])[:, None]
    else:
        logits = ended[0][0].model.logits(last, [one.adapter for one in weights])
    for (prompt, _), row in zip(ended, torch.split(logits, 1), strict=True):
        prompt.logits = row


def _score(prompt: Prompt, hidden: torch.Tensor, scores: PromptScores) -> None:
    """Scores what follows the rows of `hidden` [T, H], which are the prompt's next."""
    adapter = prompt.owner.weights.adapter
    hidden = hidden[: len(prompt.tokens) - 1 - prompt.read]  # nothing is asked behind the last
    for start in range(0, len(hidden), SCORED_ROWS):
        some = hidden[start : start + SCORED_ROWS]
        logits = prompt.model.logits(some, [adapter] * len(some))
        scores.add(logits, prompt.read + start)
