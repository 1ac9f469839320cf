"""The fake engine's `Sampler`: one token a step for each running row.

Left out: top-k, top-p, min-p and the repetition penalty. Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from weaver.engine.admission import in_turn
from weaver.engine.base import SampleProgress
from weaver.engine.fake.model import (
    BASE,
    EOS,
    VOCAB,
    ByteTokenizer,
    Floats,
    log_softmax,
    logits,
    read_weights,
)
from weaver.engine.stops import Continuation
from weaver.types import SampleDelta, SampledSequence, SampleResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weaver.engine.base import SampleJob, WeightSnapshot
    from weaver.engine.fake import FakeEngine


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence on its way: sample `index` of a job."""

    job: SampleJob
    weights: Floats
    index: int
    rng: random.Random
    continuation: Continuation
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    delta: SampleDelta | None = None
    """Of the newest token."""

    def push(self, token: int, logprob: float, sampling_logprob: float) -> None:
        text = self.continuation.push(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        if self.job.stream:
            self.delta = SampleDelta(
                index=self.index,
                tokens=(token,),
                text=text,
                logprobs=(logprob,),
                stop_reason=self.continuation.stop_reason,
            )

    @property
    def ended(self) -> bool:
        return self.continuation.stop_reason is not None

    def sequence(self, version: int) -> SampledSequence:
        assert self.continuation.stop_reason is not None
        return SampledSequence(
            tokens=tuple(self.continuation.tokens),
            text=self.continuation.text,
            logprobs=tuple(self.logprobs),
            sampling_logprobs=tuple(self.sampling_logprobs),
            stop_reason=self.continuation.stop_reason,
            weights_version=version,
        )


@dataclass(slots=True, eq=False)
class _Job:
    job: SampleJob
    weights: Floats
    version: int
    rows: list[_Row]


class FakeSampler:
    """Gives each running row one token a step; at most `slots` rows run."""

    def __init__(self, engine: FakeEngine, *, slots: int) -> None:
        self._engine = engine
        self._slots = slots
        self._weights: dict[str, tuple[Floats, int]] = {}
        self._jobs: dict[str, _Job] = {}
        self._rows: list[_Row] = []
        self._count = 0

    def publish(self, weights_id: str, snapshot: WeightSnapshot) -> None:
        with self._engine.call("publish", weights_id):
            self._weights[weights_id] = (snapshot.tensors["weight"], snapshot.version)

    def load(self, weights_id: str, base_model: str, folder: Path | None) -> int:
        with self._engine.call("load_sampler", weights_id):
            self._engine.get_model(base_model)
            loaded = (BASE, 0) if folder is None else read_weights(folder, base_model)
            self._weights[weights_id] = loaded
            return loaded[1]

    def release(self, weights_id: str) -> None:
        with self._engine.call("release", weights_id):
            self._weights.pop(weights_id, None)

    @property
    def weights_ids(self) -> frozenset[str]:
        """What is loaded, for tests."""
        return frozenset(self._weights)

    def add(self, job: SampleJob) -> None:
        with self._engine.call("add", job):
            self._count += 1
            seed = self._count if job.params.seed is None else job.params.seed
            weights, version = self._weights[job.weights_id]
            rows = [
                _Row(job, weights, i, random.Random(f"{seed}/{i}"), _continuation(job))
                for i in range(job.num_samples)
            ]
            self._jobs[job.job_id] = _Job(job, weights, version, rows)
            self._rows += rows

    def cancel(self, job_id: str) -> None:
        with self._engine.call("cancel", job_id):
            self._jobs.pop(job_id, None)
            self._rows = [row for row in self._rows if row.job.job_id != job_id]

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def step(self) -> Sequence[SampleProgress]:
        with self._engine.call("step", None):
            running = in_turn(self._rows, lambda row: row.job.tenant)[: self._slots]
            by_weights: dict[int, list[_Row]] = {}
            for row in running:
                by_weights.setdefault(id(row.weights), []).append(row)
            for rows in by_weights.values():
                _draw(rows)
            self._rows = [row for row in self._rows if not row.ended]
            deltas: dict[str, list[SampleDelta]] = {}
            for row in running:
                if row.delta is not None:
                    deltas.setdefault(row.job.job_id, []).append(row.delta)
            results = {
                job_id: _result(job)
                for job_id, job in self._jobs.items()
                if all(row.ended for row in job.rows)
            }
            for job_id in results:
                del self._jobs[job_id]
            return [
                SampleProgress(
                    job_id=job_id, deltas=deltas.get(job_id, ()), result=results.get(job_id)
                )
                for job_id in {**deltas, **results}
            ]


def _continuation(job: SampleJob) -> Continuation:
    return Continuation(
        ByteTokenizer(),
        length=job.params.max_tokens,
        stop=job.params.stop,
        stop_token_ids=frozenset({EOS, *job.params.stop_token_ids}),
        stream=job.stream,
    )


def _draw(rows: list[_Row]) -> None:
    """The next token of rows [B] that share their weights, by the inverse of the distribution."""
    last = np.array([(*row.job.prompt[-1:], *row.continuation.tokens[-1:])[-1] for row in rows])
    row_logits, _ = logits(rows[0].weights, last)
    temperatures = np.array([row.job.params.temperature for row in rows])
    greedy = temperatures == 0
    policy = log_softmax(row_logits)
    drawn_from = log_softmax(row_logits / np.where(greedy, 1.0, temperatures)[:, None])
    uniform = np.array([row.rng.random() for row in rows])
    picks = (np.exp(drawn_from).cumsum(axis=1) < uniform[:, None]).sum(axis=1)
    picks = np.where(greedy, policy.argmax(axis=1), np.minimum(picks, VOCAB - 1))
    at = np.arange(len(rows))
    sampled = np.where(greedy, 0.0, drawn_from[at, picks])
    for row, token, lp, sampled_lp in zip(
        rows, picks.tolist(), policy[at, picks].tolist(), sampled.tolist(), strict=True
    ):
        row.push(token, lp, sampled_lp)


def _result(job: _Job) -> SampleResult:
    scores: tuple[float | None, ...] | None = None
    if job.job.include_prompt_logprobs:
        prompt = np.array(job.job.prompt)
        lp = log_softmax(logits(job.weights, prompt)[0])
        scores = (None, *lp[np.arange(len(prompt) - 1), prompt[1:]].tolist())
    return SampleResult(
        sequences=tuple(row.sequence(job.version) for row in job.rows),
        prompt_tokens=tuple(job.job.prompt),
        prompt_logprobs=scores,
    )
