"""`Conversation`: the tokens that a model read and wrote, one behind the other: a `Segment` to be.

An `Agent` has one, and begins another where history was rewritten; an endpoint has one for each
history that its client tells. Nothing that is recorded is ever encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weaver.tokenizers import encode_text
from weaver.types import SampledSequence
from weaver_rl.conversations import decode_behind, encode_behind, reply_content
from weaver_rl.in_flight import versions_of
from weaver_rl.types import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[int, int, float, float, int]
"""A token, and its place in each of the other fields of a `Segment`."""


@dataclass(kw_only=True, eq=False)
class Conversation:
    """Tokens, the text that they are, and the messages that they say."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    """As the chat template took them; a reply's content is its text, special tokens included."""
    first: int = 0
    """How many of the messages were said in an earlier conversation."""
    rows: list[Row] = field(default_factory=list)
    text: str = ""
    """What the rows say, special tokens included."""
    turns: list[int] = field(default_factory=list)
    """The agent's turns whose replies were sampled here."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(row[0] for row in self.rows)

    def encoded(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text that goes on here; `special`: with those that begin every text."""
        if special:
            return encode_text(self.tokenizer, text)
        return next(encode_behind(self.tokenizer, self.tokens[-1:], text))

    def read(self, text: str, tokens: Sequence[int]) -> None:
        """Adds what the model is given to read: a text and its tokens."""
        self.text += text
        self.rows += [(token, 0, 0.0, 0.0, -1) for token in tokens]

    def write(self, sequence: SampledSequence, turn: int) -> None:
        """Adds what it sampled, as the next message."""
        self.text += decode_behind(self.tokenizer, self.tokens, sequence.tokens)
        columns = (sequence.logprobs, sequence.sampling_logprobs, versions_of(sequence))
        self.rows += [
            (token, 1, logprob, drawn, version)
            for token, logprob, drawn, version in zip(sequence.tokens, *columns, strict=True)
        ]
        stopped = sequence.stop_reason == "stop"
        said = reply_content(self.tokenizer, sequence.tokens, stopped=stopped)
        self.messages.append({"role": "assistant", "content": said})
        self.turns.append(turn)

    def reread(self, *, rows: int, text: int, messages: int) -> Conversation:
        """Another one that begins with so much of this one, of which it samples nothing again."""
        return replace(
            self,
            messages=self.messages[:messages],
            first=messages,
            rows=[(row[0], 0, 0.0, 0.0, -1) for row in self.rows[:rows]],
            text=self.text[:text],
            turns=[],
        )

    def segment(self) -> Segment:
        """Up to the last sampled token: what was only read behind it teaches nothing."""
        end = max((i + 1 for i, row in enumerate(self.rows) if row[1]), default=0)
        names = ("tokens", "mask", "logprobs", "sampling_logprobs", "versions")
        columns: dict[str, Any] = dict(zip(names, zip(*self.rows[:end], strict=True), strict=False))
        return Segment(**{name: columns.get(name, ()) for name in names})
