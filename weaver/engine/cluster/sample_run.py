"""`SampleRun`: a job of a pool from its beginning to its result, whichever workers draw for it.

Workers only draw tokens. Here they become texts, and samples end; what a worker repeats after
another has died is checked against what a stream has told already.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

from weaver.checks import check_length
from weaver.engine.base import SampleProgress
from weaver.engine.cluster.router import key_of
from weaver.engine.cluster.vllm_params import sampling_arguments, seeds_of
from weaver.engine.torch.text import Draft, Stops
from weaver.errors import EngineError, NonFiniteError, NotFoundError
from weaver.threads import call_soon
from weaver.types import SampleDelta, SampleResult

if TYPE_CHECKING:
    from weaver.engine.base import SampleJob
    from weaver.engine.cluster.sampled_model import SampledModel
    from weaver.engine.cluster.weights import Weights
    from weaver.errors import WeaverError


class Listener:
    """Who is told of a job, on the event loop that has begun it; made there."""

    def __init__(self, tell: Callable[[SampleProgress], None]) -> None:
        self._loop = current_token().native_token
        self._tell = tell
        self.over = False
        """The job has ended or was dropped; that loop's own."""
        self.dropped = False
        """The pool's thread knows of it; it alone uses this and the scope."""
        self.scope: anyio.CancelScope | None = None

    def hear(self, progress: SampleProgress) -> None:
        """From any thread."""
        call_soon(self._loop, partial(self._hear, progress))

    def leave(self) -> None:
        """Is told nothing any more; on that loop."""
        self.over = True

    def _hear(self, progress: SampleProgress) -> None:
        if not self.over:
            self.over = progress.result is not None or progress.error is not None
            self._tell(progress)


class SampleRun:
    """Belongs to the pool's thread.

    Raises:
        ContextLengthError: the prompt leaves no room for a token.
        UnsupportedError: the model has no tokenizer to make text with.
    """

    def __init__(
        self, job: SampleJob, weights: Weights, *, model: SampledModel, listener: Listener
    ) -> None:
        length, context = len(job.prompt), model.context_length
        check_length(length, context, field="prompt", max_new_tokens=int(job.num_samples > 0))
        self.job = job
        self.weights = weights
        self.key = key_of(weights.name, job.prompt)
        self.rows = max(1, job.num_samples)
        """That it takes at a worker."""
        self.placed = anyio.Event()
        """Set once it has a worker, or can have none."""
        self.worker: str | None = None
        self.number = 0
        """By which that worker knows it."""
        self.done = anyio.Event()
        """Whether it has a result, an error, or no worker any more."""
        self.error: WeaverError | None = None
        self.lost: str | None = None
        """Why its worker is gone."""
        self.cached = 0
        """Tokens of the prompt that were there already."""
        self._listener = listener
        self._length = min(job.params.max_tokens, context - length) if job.num_samples else 1
        tokenizer = model.read_tokenizer() if job.num_samples else None
        self._stops = Stops((), (), frozenset())
        if tokenizer is not None:
            self._stops = Stops.of(job.params, tokenizer, ends=model.read_ends())
        self._tokenizer: Any = tokenizer
        self._drafts: list[Draft] = []
        self._at: list[int] = []
        """Of each sample: tokens that the worker has drawn, some of them perhaps again."""
        self._prompt_logprobs: list[float | None] | None = None
        self._read = False
        """The prompt, where nothing else is wanted."""
        seed = job.params.seed
        self._seeds = seeds_of(secrets.randbits(63) if seed is None else seed, self.rows)

    def begin(self) -> dict[str, Any]:
        """The frame for a worker; the job begins with it, or begins again.

        Of a stream what was told stays.
        """
        self.done, self.lost = anyio.Event(), None
        if not (self.job.stream and self._drafts):
            self._drafts = [self._draft(i) for i in range(self.job.num_samples)]
        self._at = [0] * self.job.num_samples
        if self.job.include_prompt_logprobs and len(self.job.prompt) == 1:
            self._prompt_logprobs = [None]  # there is none to be told
        params = sampling_arguments(
            self.job.params,
            length=self._length,
            stop_token_ids=self._stops.token_ids,
            score=self.job.include_prompt_logprobs,
        )
        return {
            "do": "sample",
            "job": self.number,
            "adapter": self.weights.adapter,
            "prompt": list(self.job.prompt),
            "params": params,
            "seeds": self._seeds,
            "pieces": bool(self.job.stream or self._stops.strings or self._stops.marked),
        }

    def _draft(self, index: int) -> Draft:
        length, stream = self._length, self.job.stream
        return Draft(self._tokenizer, self._stops, index=index, length=length, stream=stream)

    def take(
        self,
        index: int,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        drawn: Sequence[float],
        ended: str | None,
        prompt_logprobs: Sequence[float] | None,
        cached: int,
    ) -> bool:
        """What a worker has drawn of a sample; answers whether it is to stop drawing more of it."""
        if self.done.is_set():
            return False
        self.cached = max(self.cached, cached if index == 0 else 0)
        if prompt_logprobs is not None:
            self._prompt_logprobs = [None, *prompt_logprobs]
            if not all(map(math.isfinite, prompt_logprobs)):
                self.fail(_not_finite("in the prompt"))
                return False
        if not self._drafts:
            self._read = self._read or ended is not None
            self._end()
            return False
        draft = self._drafts[index]
        deltas: list[SampleDelta] = []
        for token, logprob, sampling_logprob in zip(tokens, logprobs, drawn, strict=True):
            at = self._at[index]
            self._at[index] += 1
            if at < len(draft.tokens):
                if token != draft.tokens[at]:
                    self.fail(_differs(index, at))
                    return False
            elif not draft.ended:
                if not (math.isfinite(logprob) and math.isfinite(sampling_logprob)):
                    self.fail(_not_finite(f"at sample {index}, token {at}"))
                    return False
                deltas += draft.take(token, logprob=logprob, sampling_logprob=sampling_logprob)
        if deltas:
            self._listener.hear(SampleProgress(job_id=self.job.job_id, deltas=deltas))
        if ended is not None and not draft.ended:
            self.fail(EngineError(f"a worker ended sample {index} early: {ended}."))
            return False
        self._end()
        return draft.ended and ended is None and self._at[index] >= len(draft.tokens)

    def fail(self, error: WeaverError) -> None:
        """It cannot be done."""
        self.error = error
        self.done.set()
        self.placed.set()

    def lose(self, why: str) -> None:
        """Its worker is gone."""
        self.lost = why
        self.done.set()

    def _end(self) -> None:
        """Whether it is done."""
        scored = self._prompt_logprobs is not None or not self.job.include_prompt_logprobs
        if scored and (all(draft.ended for draft in self._drafts) if self._drafts else self._read):
            self.done.set()

    def result(self) -> SampleResult:
        """Once it is done; raises why it cannot be."""
        if self.error is not None:
            raise self.error
        scores = self._prompt_logprobs
        return SampleResult(
            sequences=tuple(d.sequence(version=self.weights.version) for d in self._drafts),
            prompt_tokens=tuple(self.job.prompt),
            prompt_logprobs=None if scores is None else tuple(scores),
        )


def no_weights(weights_id: str) -> NotFoundError:
    return NotFoundError(
        f"the engine has no weights {weights_id!r}.",
        field="weights_id",
        hint="Publish or load them first.",
    )


def _not_finite(where: str) -> NonFiniteError:
    return NonFiniteError(
        f"the weights give logits that are not finite {where}.",
        hint="Sample from an earlier checkpoint, and train with a smaller learning rate.",
    )


def _differs(index: int, at: int) -> EngineError:
    return EngineError(
        f"a sampler's worker ended, and another drew sample {index} otherwise from token {at} on, "
        "which was streamed already.",
        hint="Sample again, or without streaming: then a sample is repeated whole.",
    )
