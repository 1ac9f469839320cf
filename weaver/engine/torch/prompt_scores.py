"""`PromptScores`: what is asked of each place of a prompt, gathered as `Reader` goes through it.

T tokens of the prompt, K of the likeliest or targets of a place, N rows of logits, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from weaver.engine.torch.logprobs import token_scores
from weaver.tensors import TensorData
from weaver.types import TopLogprobs

if TYPE_CHECKING:
    from weaver.engine.base import SampleJob


class PromptScores:
    """Row i of what a model says behind token i is about token i+1; about the first, nothing is."""

    def __init__(self, job: SampleJob) -> None:
        self._job = job
        self._tokens = np.asarray(job.prompt, np.int64)[:, None]
        given = job.prompt_targets
        targets = self._tokens[:, :0] if given is None else given.to_numpy()
        self._targets = targets.reshape(len(self._tokens), -1)
        count = job.prompt_top_logprobs
        self._top = np.full((len(self._tokens), count), -1, np.int64)
        width = 1 + self._targets.shape[1] + count
        self._scores = np.full((len(self._tokens), width), np.nan, np.float32)
        """Of the token itself, of the targets, of the likeliest: one beside the other."""
        self.finite = True
        """Whether those are that were computed."""

    def add(self, logits: torch.Tensor, start: int) -> None:
        """Takes logits [N, V] behind token `start` and those that follow."""
        rows = slice(start + 1, start + 1 + len(logits))
        asked = np.concatenate([self._tokens[rows], self._targets[rows]], 1)
        columns = [torch.from_numpy(asked).to(logits.device).clamp(min=0)]
        if self._top.shape[1]:
            columns.append(logits.topk(self._top.shape[1]).indices)
            self._top[rows] = columns[1].cpu().numpy()
        scores = token_scores(logits, torch.cat(columns, 1))[0].cpu().numpy()
        self.finite = self.finite and bool(np.isfinite(scores).all())
        self._scores[rows] = scores

    @property
    def logprobs(self) -> tuple[float | None, ...] | None:
        if not self._job.include_prompt_logprobs:
            return None
        return (None, *self._scores[1:, 0].tolist())

    @property
    def top(self) -> TopLogprobs | None:
        count = self._top.shape[1]
        if not count:
            return None
        return TopLogprobs(tokens=TensorData(self._top), logprobs=self._scores[:, -count:])

    @property
    def targets(self) -> TensorData | None:
        given = self._job.prompt_targets
        if given is None:
            return None
        values = self._scores[:, 1 : 1 + self._targets.shape[1]]
        return TensorData(np.where(self._targets < 0, np.nan, values).reshape(given.shape))
