"""`TorchSampler`: continuous batching of sample jobs over shared base models and many adapters.

`ThreadedEngine` calls it, one call at a time. A step reads pieces
of prompts or adds one token to every row of one base model; the two take turns, so that a long
prompt does not stall running rows. B rows, T tokens of a pass, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weaver.boundary import attempt
from weaver.engine.base import SampleJob, SampleProgress
from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch.admission import Admission
from weaver.engine.torch.budget import Budget
from weaver.engine.torch.checkpoints import read_snapshot
from weaver.engine.torch.kv_cache import CachedRows
from weaver.engine.torch.logprobs import top_scores
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.models import LoadedModel, PublishedWeights
from weaver.engine.torch.reading import Reader
from weaver.engine.torch.sample_jobs import Row, RunningJob
from weaver.engine.torch.sampling import RowParams, draw_uniforms, row_params, sample
from weaver.engine.torch.text import Top
from weaver.engine.torch.waiting import WaitingJobs
from weaver.errors import NotFoundError

PREFIX_SHARE = 4
"""One part of so many of the cache may be kept for prompts that begin with the same tokens."""


class TorchSampler:
    """Samples of at most `max_rows` rows and about `cache_bytes` of keys and values at once.

    `Budget` chooses them where they are 0. The bytes are reserved for the longest that each sample
    may become. With `deterministic` the rows of each job step alone, so that no result depends on
    what else runs.
    """

    def __init__(
        self,
        store: ModelStore,
        *,
        max_rows: int = 0,
        cache_bytes: int = 0,
        prefill_tokens: int = 0,
        deterministic: bool = False,
    ) -> None:
        self._store = store
        self.budget = Budget(
            device=store.device,
            dtype=store.dtype,
            quantize=store.quantize,
            memory=store.memory,
            set_rows=max_rows,
            set_bytes=cache_bytes,
            deterministic=deterministic,
        )
        self._limits: dict[tuple[str, int], int] = {}
        """Bytes of keys and values, by base model and what other models may take."""
        self._reader = Reader(store, piece_tokens=prefill_tokens, deterministic=deterministic)
        self._deterministic = deterministic
        self._weights: dict[str, PublishedWeights] = {}
        self._jobs: dict[str, RunningJob] = {}
        self.waiting = WaitingJobs(store.room)
        store.room.users.append(self._bases_in_use)
        store.room.leave.append(self._leave)
        self._admission = Admission(
            self._jobs,
            max_rows=self.budget.rows,
            limit_bytes=self._limit_bytes,
            in_waves=deterministic,
        )
        self._groups: dict[object, _Group] = {}
        """In the order of their turns."""
        self._just_read = False

    def publish(self, weights_id: str, snapshot: WeightSnapshot) -> None:
        self._hold(weights_id, self._store.publish(snapshot))

    def load(self, weights_id: str, base_model: str, folder: Path | None) -> int:
        facts = self._store.catalog.facts(base_model)
        facts.read_ahead()
        if folder is None:
            self._hold(weights_id, PublishedWeights(facts, None, 0))
        else:
            self.publish(
                weights_id, read_snapshot(folder, facts=facts, quantize=self._store.quantize)
            )
        return self._weights[weights_id].version

    def release(self, weights_id: str) -> None:
        weights = self._weights.pop(weights_id, None)
        if weights is not None:
            self._reader.prefixes.forget(weights)

    def _hold(self, weights_id: str, weights: PublishedWeights) -> None:
        self.release(weights_id)
        self._weights[weights_id] = weights
        self._reader.prefixes.open(weights)

    def _limit_bytes(self, job: RunningJob) -> int:
        """Of the cache: what is left beside all other models that may be there."""
        room, model = self._store.room, job.model
        beside = room.beside(model.facts, base=job.weights.own is None)
        beside += room.owned_bytes - room.owned.get(model, 0)
        key = model.info.name, beside
        if key not in self._limits:
            self._limits[key] = self.budget.cache_bytes(model.facts, beside=beside)
        return self._limits[key]

    def _bases_in_use(self) -> set[str]:
        return {job.model.info.name for job in self._jobs.values() if job.weights.own is None}

    def _leave(self, model: LoadedModel) -> None:
        """Nothing of a base model that is unloaded is kept; no job has it."""
        self._reader.leave(model)

    def add(self, job: SampleJob) -> None:
        """See the protocol. It waits where its base model has no room yet.

        Raises:
            NotFoundError: the weights were never published, or released.
            ContextLengthError, UnsupportedError: see `RunningJob`.
            EngineError: see `ModelStore.base`.
        """
        if job.weights_id not in self._weights:
            raise NotFoundError(
                f"the engine has no weights {job.weights_id!r}.",
                field="weights_id",
                hint="Publish or load them first.",
            )
        weights = self._weights[job.weights_id]
        if not self.waiting.put_off(job, weights):
            self._take_in(job, weights)

    def _take_in(self, job: SampleJob, weights: PublishedWeights) -> None:
        prompt = self._reader.prompt_of(job, weights)
        self._jobs[job.job_id] = running = RunningJob(job, prompt)
        self._reader.begin(running)
        running.check_scores()  # of a prompt that others have read

    def cancel(self, job_id: str) -> None:
        self.waiting.drop(job_id)
        job = self._jobs.pop(job_id, None)
        if job is not None:
            with torch.inference_mode():
                self._drop(job)

    def close(self) -> None:
        """Forgets all weights and jobs, and the memory of their rows."""
        for weights_id in list(self._weights):
            self.release(weights_id)
        self.waiting.clear()
        for job_id in list(self._jobs):
            self.cancel(job_id)

    @property
    def busy(self) -> bool:
        return bool(self._jobs) or self.waiting.delay_s == 0

    @property
    def delay_s(self) -> float | None:
        """Until a job that waits for its base model may begin; None where none waits."""
        return self.waiting.delay_s

    @property
    def counts(self) -> Mapping[str, int]:
        """See `Engine`."""
        return {
            "prompt_tokens": self._reader.prompt_tokens,
            "reused_prompt_tokens": self._reader.reused_tokens,
        }

    def step(self) -> Sequence[SampleProgress]:
        refused: list[SampleProgress] = []
        for waited, weights in self.waiting.due():
            failure = attempt(self._take_in, waited, weights)
            if failure is not None:
                refused.append(SampleProgress(job_id=waited.job_id, error=failure))
        with torch.inference_mode():
            self._admission.claim()
            room = self._room_for_prefixes()
            self._reader.prefixes.trim(room)
            jobs = [job for job in self._jobs.values() if job.admitted and job.prompt.unread]
            if jobs and not (self._just_read and self._groups):
                self._reader.read(list(dict.fromkeys(job.prompt for job in jobs)), limit=room)
                for job in jobs:
                    job.check_scores()
                self._just_read = True
            elif self._groups:
                self._decode(room)
                self._just_read = False
            self._begin()
            told = [p for job in list(self._jobs.values()) if (p := self._progress(job))]
        return [*refused, *told]

    def _room_for_prefixes(self) -> int:
        """Bytes that they may take, beside what running jobs hold."""
        jobs = {job.model: job for job in self._jobs.values()}
        limit = min(map(self._limit_bytes, jobs.values()), default=0)
        return max(0, min(limit // PREFIX_SHARE, limit - self._admission.held_bytes))

    def _begin(self) -> None:
        """Draws the first tokens of samples that have a place; those that go on get a row each."""
        ready: dict[LoadedModel, list[tuple[Row, torch.Tensor]]] = {}
        for job in self._jobs.values():
            count = min(job.pending, job.places - job.running)
            if self._deterministic and job.running:
                continue  # the next wave follows the last row of this one
            logits = job.prompt.logits
            if count and logits is not None and job.error is None:
                begun = ready.setdefault(job.model, [])
                begun += [(row, logits) for row in job.begin(count, logits)]
        for model, begun in ready.items():
            self._store.turn_to(model)
            rows = [row for row, _ in begun]
            _draw(rows, torch.cat([logits for _, logits in begun]), _row_params(rows, model))
            going: dict[object, list[Row]] = {}
            for row in rows:
                if not row.draft.ended and row.job.error is None:
                    going.setdefault(row.job if self._deterministic else model, []).append(row)
            for key, some in going.items():
                if key not in self._groups:
                    self._groups[key] = _Group(model, some[0].job.prompt.cache.rows())
                self._groups[key].add(some)
            for job in dict.fromkeys(row.job for row in rows):
                if not job.pending:
                    self._reader.end(job)

    def _decode(self, room: int) -> None:
        """Adds one token to each row of the group whose turn it is.

        `room`: bytes that prefixes may take.
        """
        key, group = next(iter(self._groups.items()))
        self._store.turn_to(group.model)
        rows = group.rows
        _draw(rows, group.forward(), group.params)
        ended = [row for row in rows if row.draft.ended]
        for row in ended:
            self._reader.keep(row, limit=room)
        group.remove(ended)
        del self._groups[key]
        if group.rows:
            self._groups[key] = group

    def _progress(self, job: RunningJob) -> SampleProgress | None:
        """What this step did for a job; one that ended is forgotten."""
        deltas, job.deltas = job.deltas, []
        result = job.result() if job.error is None and job.done else None
        if job.error is not None or result is not None:
            del self._jobs[job.job.job_id]
            self._drop(job)
        elif not deltas:
            return None
        return SampleProgress(job_id=job.job.job_id, deltas=deltas, result=result, error=job.error)

    def _drop(self, job: RunningJob) -> None:
        self._reader.end(job)
        for key, group in list(self._groups.items()):
            group.remove([row for row in group.rows if row.job is job])
            if not group.rows:
                del self._groups[key]


class _Group:
    """Rows that step together, rows of one adapter side by side."""

    def __init__(self, model: LoadedModel, cache: CachedRows[Any, Any]) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._cache = cache
        self._params: RowParams | None = None

    def add(self, rows: Sequence[Row]) -> None:
        begins = [(p.cached, len(list(some))) for p, some in groupby(rows, lambda r: r.job.prompt)]
        for row, place in zip(rows, self._cache.add(begins), strict=True):
            row.place = place
        self.rows = sorted([*self.rows, *rows], key=lambda row: id(row.job.weights))
        self._params = None

    def remove(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        self._cache.remove([row.place for row in rows])
        gone = set(rows)
        self.rows = [row for row in self.rows if row not in gone]
        self._params = None

    @property
    def params(self) -> RowParams:
        if self._params is None:
            self._params = _row_params(self.rows, self.model)
        return self._params

    def forward(self) -> torch.Tensor:
        """float32 [B, V] behind the last token of each row."""
        adapters = [row.job.weights.adapter for row in self.rows]
        tokens, places = zip(*((row.draft.tokens[-1], row.place) for row in self.rows), strict=True)
        return self.model.next_logits(tokens, adapters, self._cache, places)


def _draw(rows: Sequence[Row], logits: torch.Tensor, params: RowParams) -> None:
    """Draws each row's next token from logits [B, V]; rows may end."""
    keys = np.array([row.key for row in rows], dtype=np.uint64)
    positions = np.array([len(row.draft.logprobs) for row in rows], dtype=np.uint64)
    seen = [row.seen for row in rows if row.seen is not None]
    counts = [row.counts for row in rows if row.counts is not None]
    allowed = [row.guide.allowed for row in rows if row.guide is not None]
    draws = sample(
        logits,
        params,
        uniforms=draw_uniforms(keys, positions).to(logits.device),
        seen=torch.stack(seen) if seen else None,
        counts=torch.stack(counts) if counts else None,
        allowed=torch.stack(allowed).to(logits.device) if allowed else None,
    )
    columns = torch.stack([column.double() for column in draws], dim=1)  # exact, and one copy
    tops = _tops(rows, logits)
    for row, (token, logprob, sampling_logprob), top in zip(
        rows, columns.tolist(), tops, strict=True
    ):
        row.job.take(row, int(token), logprob=logprob, sampling_logprob=sampling_logprob, top=top)


def _tops(rows: Sequence[Row], logits: torch.Tensor) -> list[Top | None]:
    """The likeliest tokens of logits [B, V], where they are wanted."""
    tops: list[Top | None] = [None] * len(rows)
    counts = [row.job.job.top_logprobs for row in rows]
    wanted = [i for i, count in enumerate(counts) if count]
    if wanted:
        some = logits if len(wanted) == len(rows) else logits[wanted]
        tokens, logprobs = top_scores(some, max(counts))
        for i, ids, scores in zip(wanted, tokens.tolist(), logprobs.tolist(), strict=True):
            tops[i] = ids[: counts[i]], scores[: counts[i]]
    return tops


def _row_params(rows: Sequence[Row], model: LoadedModel) -> RowParams:
    params = [row.job.job.params for row in rows]
    return row_params(params, model.info.vocab_size, device=model.device)
