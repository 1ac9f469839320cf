"""The fake engine's `Sampler`: one token a step for each running row.

Left out: top-k, top-p, min-p, penalties and biases. Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fake_engine.model import (
    BASE,
    EOS,
    VOCAB,
    ByteTokenizer,
    Floats,
    log_softmax,
    logits,
    read_weights,
)
from weaver.engine.base import SampleProgress
from weaver.engine.torch.admission import in_turn
from weaver.engine.torch.text import Draft, Stops
from weaver.tensors import TensorData
from weaver.types import SampleDelta, SampleResult, TopLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_engine import FakeEngine
    from weaver.engine.base import SampleJob
    from weaver.engine.blocking import WeightSnapshot


@dataclass(slots=True, eq=False)
class _Job:
    job: SampleJob
    weights: Floats
    version: int
    rows: list[_Row] = field(default_factory=list)
    deltas: list[SampleDelta] = field(default_factory=list)

    def result(self) -> SampleResult | None:
        """Once all of its samples have ended."""
        if not all(row.draft.ended for row in self.rows):
            return None
        return SampleResult(
            sequences=tuple(row.draft.sequence(version=self.version) for row in self.rows),
            prompt_tokens=tuple(self.job.prompt),
            **(self._scores() if self.job.scores_prompt else {}),
        )

    def _scores(self) -> dict[str, Any]:
        """What is asked of the prompt [T]: behind each token of what follows it."""
        prompt, targets = np.array(self.job.prompt), self.job.prompt_targets
        lp = np.full((len(prompt), VOCAB), np.nan)
        lp[1:] = log_softmax(logits(self.weights, prompt)[0])[:-1]
        told: dict[str, Any] = {}
        at = np.arange(len(prompt))
        if self.job.include_prompt_logprobs:
            told["prompt_logprobs"] = (None, *lp[at, prompt].tolist()[1:])
        if count := self.job.prompt_top_logprobs:
            tokens = (-lp).argsort(1)[:, :count]
            tokens[0] = -1
            scores = np.take_along_axis(lp, tokens, 1)
            told["prompt_top_logprobs"] = TopLogprobs(tokens=tokens, logprobs=scores)
        if targets is not None:
            given = targets.to_numpy().reshape(len(prompt), -1)
            scores = np.where(given < 0, np.nan, np.take_along_axis(lp, given, 1))
            told["prompt_target_logprobs"] = TensorData(scores.reshape(targets.shape))
        return told


@dataclass(slots=True, eq=False)
class _Row:
    job: _Job
    draft: Draft
    rng: random.Random

    @property
    def last(self) -> int:
        """The token that the next one follows."""
        return (*self.job.job.prompt[-1:], *self.draft.tokens[-1:])[-1]


class FakeSampler:
    """Gives each running row one token a step; at most `slots` rows run."""

    def __init__(self, engine: FakeEngine, *, slots: int) -> None:
        self._engine = engine
        self._slots = slots
        self._weights: dict[str, tuple[Floats, int]] = {}
        self._jobs: dict[str, _Job] = {}
        self._count = 0
        self.counts = {"prompt_tokens": 0, "reused_prompt_tokens": 0}

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
            self.counts["prompt_tokens"] += len(job.prompt)
            seed = self._count if job.params.seed is None else job.params.seed
            stops = Stops.of(job.params, ByteTokenizer(), ends=frozenset({EOS}))
            mine = self._jobs[job.job_id] = _Job(job, *self._weights[job.weights_id])
            for i in range(job.num_samples):
                draft = Draft(
                    ByteTokenizer(),
                    stops,
                    index=i,
                    length=job.params.max_tokens,
                    stream=job.stream,
                )
                mine.rows.append(_Row(mine, draft, random.Random(f"{seed}/{i}")))

    def cancel(self, job_id: str) -> None:
        with self._engine.call("cancel", job_id):
            self._jobs.pop(job_id, None)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def step(self) -> Sequence[SampleProgress]:
        with self._engine.call("step", None):
            rows = [row for job in self._jobs.values() for row in job.rows if not row.draft.ended]
            running = in_turn(rows, lambda row: row.job.job.tenant)[: self._slots]
            if running:
                _draw(running)
            progress = []
            for job_id, job in list(self._jobs.items()):
                deltas, job.deltas = job.deltas, []
                result = job.result()
                if result is not None:
                    del self._jobs[job_id]
                if deltas or result is not None:
                    progress.append(SampleProgress(job_id=job_id, deltas=deltas, result=result))
            return progress


def _draw(rows: Sequence[_Row]) -> None:
    """The next token of rows [B], by the inverse of the distribution."""
    weights = np.stack([row.job.weights for row in rows])
    row_logits, _ = logits(weights, np.array([row.last for row in rows]))
    temperatures = np.array([row.job.job.params.temperature for row in rows])
    greedy = temperatures == 0
    policy = log_softmax(row_logits)
    drawn_from = log_softmax(row_logits / np.where(greedy, 1.0, temperatures)[:, None])
    uniform = np.array([row.rng.random() for row in rows])
    picks = (np.exp(drawn_from).cumsum(axis=1) < uniform[:, None]).sum(axis=1)
    picks = np.where(greedy, policy.argmax(axis=1), np.minimum(picks, VOCAB - 1))
    at = np.arange(len(rows))
    sampled = np.where(greedy, 0.0, drawn_from[at, picks])
    for row, token, lp, sampled_lp, all_lp in zip(
        rows, picks.tolist(), policy[at, picks].tolist(), sampled.tolist(), policy, strict=True
    ):
        top = None
        if count := row.job.job.top_logprobs:
            likeliest = (-all_lp).argsort()[:count]
            top = likeliest.tolist(), all_lp[likeliest].tolist()
        row.job.deltas += row.draft.take(token, logprob=lp, sampling_logprob=sampled_lp, top=top)
