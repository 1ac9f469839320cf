"""`InFlight`: the newest weights of a run, to sample from while they move. `off_policy` has one.

Agents draw from it as from a sampling client. A turn begins with the newest weights; within a
reply, if so asked, newer ones go on where older ones were: what is being drawn is cancelled, and
the prompt with the tokens so far is a new request, whose prompt the newer weights read anew. So no
key and value of other weights is ever attended to, a token's log-probabilities are those of the
weights that drew it behind the whole text before it, and the trainer can compute them again. That
costs the reading of each unfinished reply at each move. (PipelineRL, arXiv:2509.19128, keeps the
old keys and values; AReaL, arXiv:2505.24298, reads anew.)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, cast

import anyio

from weaver import AsyncSamplingClient
from weaver.errors import EngineError
from weaver.types import (
    ModelInfo,
    ModelInput,
    SampleDelta,
    SampledSequence,
    SampleResult,
    SamplingParams,
)
from weaver_rl.guard import gather

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CHARACTER = 4
"""Tokens that a character may take: the bytes of UTF-8."""


class MovedSequence(SampledSequence):
    """One whose tokens may be of several weights; `weights_version` is that of the last."""

    versions: tuple[int, ...]
    """Of each token."""


def versions_of(sequence: SampledSequence) -> tuple[int, ...]:
    """The optimizer step of the weights that drew each token."""
    if isinstance(sequence, MovedSequence):
        return sequence.versions
    return (sequence.weights_version,) * len(sequence.tokens)


class InFlight:
    """
    Args:
        newest: what is sampled from until `move`.
        within: whether replies that are being drawn go on with newer weights.
    """

    def __init__(self, newest: AsyncSamplingClient, *, within: bool) -> None:
        self._newest = newest
        self._within = within
        self._running: list[anyio.CancelScope] = []

    @property
    def model_info(self) -> ModelInfo:
        return self._newest.model_info

    @property
    def base_model(self) -> str:
        return self._newest.base_model

    async def get_tokenizer(self) -> Any:
        return await self._newest.get_tokenizer()

    def move(self, newest: AsyncSamplingClient) -> None:
        """From now on these are sampled from; former ones end what is not to go on with them."""
        self._newest = newest
        for scope in self._running:
            scope.cancel()

    async def sample(
        self,
        prompt: ModelInput,
        params: SamplingParams,
        *,
        num_samples: int = 1,
        top_logprobs: int = 0,
    ) -> SampleResult:
        """As a sampling client's; `params` has a seed. What is `unfollowed` is one request."""
        tokenizer = await self.get_tokenizer()
        if not self._within or top_logprobs or unfollowed(params, tokenizer):
            return await self._newest.sample(
                prompt, params, num_samples=num_samples, top_logprobs=top_logprobs
            )
        replies = [_Reply(i, prompt, params, tokenizer) for i in range(num_samples)]
        await self._go_on(replies)  # the only time that they are alike

        async def to_end(reply: _Reply) -> MovedSequence:
            while not reply.ended:
                await self._go_on([reply])
            return reply.sequence()

        sequences = await gather([partial(to_end, reply) for reply in replies])
        return SampleResult(sequences=tuple(sequences), prompt_tokens=tuple(prompt.to_ints()))

    async def _go_on(self, replies: Sequence[_Reply]) -> None:
        """Draws replies that have the same tokens, until all have ended or weights have moved."""
        client, before = self._newest, len(replies[0].tokens)
        (prompt, params), *_ = [reply.request() for reply in replies]
        with anyio.CancelScope() as scope:
            self._running.append(scope)
            try:
                stream = client.stream(prompt, params, num_samples=len(replies))
                async with aclosing(cast("AsyncGenerator[SampleDelta, None]", stream)) as deltas:
                    async for delta in deltas:
                        reply = replies[delta.index]
                        reply.take(delta, version=client.weights_version)
                        if reply.ended and delta.stop_reason is None:
                            break  # it alone was drawn: see `_stops_across`
            except EngineError as error:
                if all(len(reply.tokens) == before for reply in replies):
                    raise  # nothing came of it, and nothing would of another
                log.warning("A reply is drawn on from where it was: %s", error)
            finally:
                self._running.remove(scope)


def unfollowed(params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The parameter that goes by all tokens of a reply, and not from one request into the next."""
    names = ("json_schema", "grammar", "presence_penalty", "frequency_penalty")
    found = next((name for name in names if getattr(params, name)), None)
    return found or ("stop" if any(_is_mixed(stop, tokenizer) for stop in params.stop) else None)


def _is_mixed(stop: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a stop string has special tokens beside text."""
    tokens = tokenizer.encode(stop, add_special_tokens=False)
    return tokenizer.decode(tokens, skip_special_tokens=True) not in ("", stop)


@dataclass(slots=True, eq=False)
class _Reply:
    """One that is being drawn, by one request or several."""

    index: int
    """Among those of the same prompt."""
    prompt: ModelInput
    params: SamplingParams
    tokenizer: PreTrainedTokenizerBase
    tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _sampling_logprobs: list[float] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _text: str = ""
    """What the requests told."""
    _ended: str | None = None
    _begun_at: int | None = None
    """Tokens before the request of now; None before the first."""

    @property
    def ended(self) -> bool:
        return self._ended is not None

    def request(self) -> tuple[ModelInput, SamplingParams]:
        """What is to be asked next. A seed's numbers would come again, so each has its own."""
        first, self._begun_at = self._begun_at is None, len(self.tokens)
        if first:
            return self.prompt, self.params
        dice = Random(f"{self.params.seed}/{self.index}/{self._begun_at}")
        left = self.params.max_tokens - self._begun_at
        update = {"max_tokens": left, "seed": dice.getrandbits(63)}
        tokens = [*self.prompt.to_ints(), *self.tokens]
        return ModelInput.from_ints(tokens), self.params.model_copy(update=update)

    def take(self, delta: SampleDelta, *, version: int) -> None:
        """The next tokens, of weights of that version; they may end it."""
        if self.ended:
            return
        self.tokens += delta.tokens
        self._logprobs += delta.logprobs
        self._sampling_logprobs += delta.sampling_logprobs
        self._versions += [version] * len(delta.tokens)
        self._text += delta.text
        self._ended = delta.stop_reason or ("stop" if self._stops_across() else None)

    def _stops_across(self) -> bool:
        """Whether a stop string is complete that began in an earlier request, unseen by this."""
        reach = CHARACTER * max(map(len, self.params.stop), default=0)
        if not self._begun_at or len(self.tokens) > self._begun_at + reach:
            return False
        text = self._decoded(self.tokens[max(0, self._begun_at - reach) :])
        return any(stop in text for stop in self.params.stop)

    def sequence(self) -> MovedSequence:
        return MovedSequence(
            tokens=tuple(self.tokens),
            text=self._whole_text() if self._begun_at else self._text,
            logprobs=tuple(self._logprobs),
            sampling_logprobs=tuple(self._sampling_logprobs),
            stop_reason="stop" if self._ended == "stop" else "length",
            weights_version=self._versions[-1],
            versions=tuple(self._versions),
        )

    def _whole_text(self) -> str:
        """That of all tokens, as one request would have told it."""
        ended = self._ended == "stop" and self.tokens[-1] in self.params.stop_token_ids
        text = self._decoded(self.tokens[:-1] if ended else self.tokens)
        return text[: min((text.find(s) for s in self.params.stop if s in text), default=len(text))]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
