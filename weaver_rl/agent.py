"""`Agent`: a model in one rollout. An environment talks to it; it records what it read and wrote.

Tokens in, tokens out: the recorded tokens are those that the sampler read and sampled. A
conversation is rendered as text, and only what is new in it is encoded, behind the tokens that are
there; no reply is ever encoded again. Where the chat template rewrote history (it dropped the
reasoning of earlier turns, say), a new segment begins.

A turn is sampled with a seed that follows from what it is, so that a resumed run draws what it
would have drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weaver import AsyncSamplingClient
from weaver.errors import InvalidRequestError
from weaver.tokenizers import end_tokens
from weaver.types import ModelInput, SampledSequence, SampleResult, SamplingParams, StopReason
from weaver_rl.clock import timed
from weaver_rl.conversations import render
from weaver_rl.examples import read_messages
from weaver_rl.in_flight import InFlight
from weaver_rl.recorded import Conversation
from weaver_rl.types import Reply, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Agent", "Budget", "BudgetExceeded"]

Prompt = str | Sequence[Mapping[str, str]]
"""A text, sampled from as it is, or chat messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one rollout may use; None is no limit. `Budget(turns=8, tokens=1024, seconds=60)`"""

    turns: int | None = None
    """Replies."""
    tokens: int | None = None
    """Sampled tokens."""
    seconds: float | None = None
    """Wall time; a rollout that takes longer has failed."""


class BudgetExceeded(Exception):
    """No turn or token is left, or the context is full. An environment may catch it.

    One that does not ends with reward 0 and the metric `budget_exceeded`.
    """


class Agent:
    """One conversation with the weights of `sampler`. Turns are awaited one after the other.

    Args:
        seed: of this rollout; each turn's sampling seed is derived from it.
    """

    def __init__(
        self,
        sampler: AsyncSamplingClient | InFlight,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: SamplingParams,
        seed: int,
        budget: Budget | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._sampler = sampler
        size = sampler.model_info.vocab_size
        ends = {token for token in end_tokens(tokenizer).values() if token < size}
        stops = tuple(ends.union(sampling.stop_token_ids))  # the template may be set on this side
        self._sampling = sampling.model_copy(update={"stop_token_ids": stops})
        self._seed = seed
        self._budget = budget or Budget()
        self._talk = Conversation(tokenizer=tokenizer)  # the one that goes on
        self._talks = [self._talk]
        self.base_model = sampler.base_model
        self._tools: Sequence[Mapping[str, Any]] = ()
        self._lengths: list[int] = []  # sampled tokens, by turn
        self._rewards: dict[int, float] = {}  # by turn
        self._stop_reason: StopReason = "stop"

    def system(self, text: str) -> None:
        """Adds a system message, read with the next turn."""
        self._talk.messages.append({"role": "system", "content": text})

    def show_tools(self, schemas: Sequence[Mapping[str, Any]]) -> None:
        """Lets the chat template show these tools; see `weaver_rl.tools`."""
        self._tools = schemas

    async def chat(self, text: str, *, role: str = "user", max_tokens: int | None = None) -> Reply:
        """Says something through the chat template, and samples the answer.

        Raises:
            BudgetExceeded: no turn, token or context is left.
            ConfigError: the tokenizer has no chat template.
            InvalidRequestError: the template refuses it.
        """
        return await self.respond([{"role": role, "content": text}], max_tokens=max_tokens)

    async def complete(self, text: str, *, max_tokens: int | None = None) -> Reply:
        """Appends text as it is, without a template, and samples what follows.

        Raises:
            BudgetExceeded: no turn, token or context is left.
        """
        return await self.respond(text, max_tokens=max_tokens)

    async def respond(self, prompt: Prompt, *, max_tokens: int | None = None) -> Reply:
        """`complete` for a text, `chat` for messages, which are checked."""
        (reply,) = await respond_all([self], prompt, max_tokens=max_tokens)
        return reply

    @property
    def messages(self) -> tuple[Mapping[str, str], ...]:
        """What was said so far; of several conversations, the one that goes on comes last."""
        talks = sorted(self._talks, key=lambda talk: talk is self._talk)
        return tuple(said for talk in talks for said in talk.messages[talk.first :])

    @property
    def trajectory(self) -> Trajectory:
        """What was read and written so far."""
        segments = [talk.segment() for talk in self._talks]
        turns = [turn for talk in self._talks for turn in talk.turns]
        rewards = [self._rewards.get(turn, 0.0) for turn in turns] if self._rewards else []
        return Trajectory(
            segments=tuple(segment for segment in segments if segment.tokens),
            messages=self.messages,
            stop_reason=self._stop_reason,
            turns=len(turns),
            reply_lengths=tuple(self._lengths[turn] for turn in turns),
            turn_rewards=tuple(rewards),
        )

    def reward(self, value: float, *, turn: int = -1) -> None:
        """What a turn was worth, in units of reward, for `credit.turns`; several are added.

        The environment's own result is not changed by it.

        Args:
            turn: from 0; -1: the last, -2: the one before.

        Raises:
            InvalidRequestError: there is no such turn, or the value is not finite.
        """
        count = len(self._lengths)
        if not -count <= turn < count:
            raise InvalidRequestError(
                f"is {turn}, and {count} turns were played.",
                field="turn",
                hint="Reward a turn behind its reply: -1 is the last, 0 the first.",
            )
        if not math.isfinite(value):
            raise InvalidRequestError(f"is {value}.", field="value", hint="It must be finite.")
        turn %= count
        self._rewards[turn] = self._rewards.get(turn, 0.0) + float(value)

    def _read(self, prompt: Prompt) -> None:
        """Brings the context to where the next reply begins."""
        talk = self._talk
        if isinstance(prompt, str):
            talk.messages.append({"role": "user", "content": prompt})
            new, special = prompt, not talk.rows
        else:
            talk.messages += read_messages(prompt, "prompt")
            full = render(self.tokenizer, talk.messages, tools=self._tools)
            if not full.startswith(talk.text):
                said = len(talk.messages)
                talk = self._talk = talk.reread(rows=0, text=0, messages=said)
                self._talks.append(talk)
            new, special = full[len(talk.text) :], False
        talk.read(new, talk.encoded(new, special=special))

    def _write(self, sequence: SampledSequence) -> Reply:
        reply = Reply(
            text=sequence.text,
            tokens=sequence.tokens,
            logprobs=sequence.logprobs,
            sampling_logprobs=sequence.sampling_logprobs,
            stop_reason=sequence.stop_reason,
            weights_version=sequence.weights_version,
            prompt_tokens=self._talk.tokens,
        )
        self.record(self._talk, sequence)
        return reply

    def record(self, talk: Conversation, sequence: SampledSequence) -> None:
        """Makes a reply the next turn; `talk` has read all before it. Endpoints call it, too."""
        if all(one is not talk for one in self._talks):
            self._talks.append(talk)
        self._talk = talk
        talk.write(sequence, len(self._lengths))
        self._lengths.append(len(sequence.tokens))
        self._stop_reason = sequence.stop_reason

    async def draw(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int | None = None,
        num_samples: int = 1,
        top_logprobs: int = 0,
        wanted: SamplingParams | None = None,
    ) -> SampleResult:
        """Samples behind these tokens, within the budget; nothing is recorded yet.

        Args:
            wanted: of an endpoint's client. Its stops, its form and its seed, which is mixed into
                the turn's, count; the distribution is the run's. Replies end with the context.

        Raises:
            BudgetExceeded: no turn, token or context is left.
        """
        params = self._params(len(tokens), max_tokens, wanted)
        with timed("sampling"):
            return await self._sampler.sample(
                ModelInput.from_ints(tokens),
                params,
                num_samples=num_samples,
                top_logprobs=top_logprobs,
            )

    def _params(
        self, length: int, max_tokens: int | None, wanted: SamplingParams | None
    ) -> SamplingParams:
        """This turn's parameters, within what is left of the budget and the context."""
        budget, most = self._budget, max_tokens or self._sampling.max_tokens
        turns, sampled = len(self._lengths), sum(self._lengths)
        if budget.turns is not None and turns >= budget.turns:
            raise BudgetExceeded(f"all {budget.turns} turns are used")
        left = float("inf") if budget.tokens is None else budget.tokens - sampled
        room = self._sampler.model_info.context_length - length
        # a first prompt that does not fit is an error of the task: sample names it
        if turns or (wanted is not None and room > 0):
            left = min(left, room)
        if left < 1:
            raise BudgetExceeded(f"{sampled} tokens are sampled, and no more fit")
        own = self._sampling
        update: dict[str, Any] = {"max_tokens": int(min(most, left))}
        given = () if wanted is None or wanted.seed is None else (wanted.seed,)
        update["seed"] = derive_seed(self._seed, turns, *given)
        if wanted is not None:
            update["stop"] = (*own.stop, *wanted.stop)
            update["stop_token_ids"] = (*own.stop_token_ids, *wanted.stop_token_ids)
            update["json_schema"] = wanted.json_schema or own.json_schema
            update["grammar"] = wanted.grammar or own.grammar
        return own.model_copy(update=update)


async def respond_all(
    agents: Sequence[Agent], prompt: Prompt, *, max_tokens: int | None = None
) -> list[Reply]:
    """One reply each of agents that stand at the same point, in one call: one prefill for all.

    The seed is that of the first. Raises what `Agent.respond` raises.
    """
    for agent in agents:
        agent._read(prompt)
    tokens, count = agents[0]._talk.tokens, len(agents)
    result = await agents[0].draw(tokens, max_tokens=max_tokens, num_samples=count)
    return [agent._write(said) for agent, said in zip(agents, result.sequences, strict=True)]


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^63) for `(run's seed, step, problem, sample, turn)` or any such numbers."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
