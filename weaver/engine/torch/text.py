"""Texts: how a prompt becomes tokens, how drawn tokens become a text, and when a sample ends.

`TorchEngine.encode` calls `encode_prompt`; the sampler, and the fake engine of the tests, have one
`Draft` a sample.

Text is decoded token by token only where a stop string or a reader of deltas needs it. A byte-level
token may hold part of a character and a stop string may span tokens, so what could still change, or
become part of a stop string, is held back. The text has no special tokens in it. A stop string with
one ("<|im_end|>") is looked for in a second text that has them, and where it begins there is where
the first text ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from weaver.boundary import converting
from weaver.engine.base import Tokenizer
from weaver.errors import InvalidRequestError, UnsupportedError
from weaver.tensors import TensorData
from weaver.tokenizers import encode_text
from weaver.types import (
    JsonDict,
    Message,
    SampleDelta,
    SampledSequence,
    SamplingParams,
    StopReason,
    TopLogprobs,
)

Top = tuple[Sequence[int], Sequence[float]]
"""The likeliest tokens at a place, and their log-probabilities."""
_REPLACEMENT = "\ufffd"
_WINDOW = 16


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends the samples of one job."""

    strings: tuple[str, ...]
    marked: tuple[str, ...]
    """Strings with special tokens in them."""
    token_ids: frozenset[int]

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Tokenizer, *, ends: frozenset[int]) -> Stops:
        """`ends` are the model's own end-of-sequence tokens."""
        marked = tuple(string for string in params.stop if _has_special(tokenizer, string))
        strings = tuple(string for string in params.stop if string not in marked)
        own = frozenset() if params.ignore_eos else ends
        return cls(strings, marked, own.union(params.stop_token_ids))


def _has_special(tokenizer: Tokenizer, text: str) -> bool:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    shown, whole = (tokenizer.decode(tokens, skip_special_tokens=skip) for skip in (True, False))
    return shown != whole


class TextStream:
    """Decodes tokens as they come; what it has answered never changes.

    Decoders may strip the space before the first token, so tokens are decoded behind earlier ones.
    `tokenizers` has a `DecodeStream`, but only for its own tokenizers; it keeps an unfinished last
    character to itself, and raises where byte tokens make no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._window: list[int] = []
        self._whole = 0
        """Tokens of the window that end with a whole character."""
        self._answered = 0
        """Characters of the window."""

    def push(self, token: int) -> str:
        """The text that became certain; skipped tokens have none."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):  # some decoders then spoil whole characters before it too
            return ""
        new = text[self._answered :]
        self._answered = len(text)
        if new:
            if len(self._window) > _WINDOW:
                self._window = self._window[self._whole :]
                self._answered = len(self._decode(self._window))
            self._whole = len(self._window)
        return new

    def flush(self) -> str:
        """What is left at the end: replacements of characters that were never completed."""
        rest = self._decode(self._window)[self._answered :]
        self._answered += len(rest)
        return rest


class MarkedText:
    """The text with special tokens, and the stop strings to look for in it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, skip_special_tokens=False)
        self._stop = stop
        self._text = ""
        self._ends = [(0, 0)]
        """Lengths of this text and of the one without special tokens, behind each token."""

    def push(self, token: int, shown: int) -> list[int]:
        """Where in the text without special tokens, now of `shown` characters, stops begin."""
        new = self._stream.push(token)
        self._text += new
        self._ends.append((len(self._text), shown))
        return [self._shown(at) for at in _find(self._text, self._stop, new=len(new))]

    def held_from(self) -> int:
        """Where in the text without special tokens the beginning of a stop string may stand."""
        return self._shown(len(self._text) - _begun(self._text, self._stop))

    def _shown(self, at: int) -> int:
        i = bisect_right(self._ends, at, key=lambda ends: ends[0])
        if i == len(self._ends):
            return self._ends[-1][1]
        end, shown = self._ends[i]
        return max(self._ends[i - 1][1], shown - (end - at))


class Draft:
    """Sample `index` of its job while it is drawn: its tokens, its text, and why it ended.

    `length` is the most tokens it may have. Without stop strings and `stream`, the text is decoded
    once, at the end.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Stops, *, index: int, length: int, stream: bool
    ) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.sampling_logprobs: list[float] = []
        self._top: list[Top] = []
        self.text = ""
        """Complete once it has ended: before the stop string or token, without specials."""
        self.stop_reason: StopReason | None = None
        self._tokenizer = tokenizer
        self._stops = stops
        self._length = length
        self._streams = stream
        self._marked = MarkedText(tokenizer, stops.marked) if stops.marked else None
        some = stream or stops.strings or stops.marked
        self._stream = TextStream(tokenizer) if some else None
        self._sent = 0

    @property
    def ended(self) -> bool:
        return self.stop_reason is not None

    def take(
        self,
        token: int,
        *,
        logprob: float,
        sampling_logprob: float,
        top: Top | None = None,
        last: bool = False,
    ) -> list[SampleDelta]:
        """Adds a token, which may end the sample; answers what a reader of a stream sees of it.

        `top`: the likeliest tokens at its place, where they are wanted. `last`: nothing may follow.
        """
        text = self.push(token, last=last)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        if top is not None:
            self._top.append(top)
        if not self._streams:
            return []
        delta = SampleDelta(
            index=self.index,
            tokens=(token,),
            text=text,
            logprobs=(logprob,),
            sampling_logprobs=(sampling_logprob,),
            stop_reason=self.stop_reason,
            top_logprobs=None if top is None else _top_logprobs([top]),
        )
        return [delta]

    def sequence(self, *, version: int) -> SampledSequence:
        """Once it has ended; `version` is that of the weights."""
        assert self.stop_reason is not None
        return SampledSequence(
            tokens=tuple(self.tokens),
            text=self.text,
            logprobs=tuple(self.logprobs),
            sampling_logprobs=tuple(self.sampling_logprobs),
            stop_reason=self.stop_reason,
            weights_version=version,
            top_logprobs=_top_logprobs(self._top) if self._top else None,
        )

    def push(self, token: int, *, last: bool = False) -> str:
        """Takes the next token and answers the text that a reader may see now."""
        self.tokens.append(token)
        ended_by_token = token in self._stops.token_ids
        if self._stream is not None:
            self._grow(self._stream, token, ended_by_token)
        last = last or ended_by_token
        if not self.ended and (last or len(self.tokens) == self._length):
            self.stop_reason = "stop" if last else "length"
            if self._stream is not None:
                self.text += self._stream.flush()
            else:
                tokens = self.tokens[:-1] if ended_by_token else self.tokens
                self.text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        end = len(self.text)
        if not self.ended:
            end -= _begun(self.text, self._stops.strings)
            if self._marked is not None:
                end = min(end, self._marked.held_from())
        new = self.text[self._sent : end]
        self._sent = end
        return new

    def _grow(self, stream: TextStream, token: int, ended_by_token: bool) -> None:
        new = "" if ended_by_token else stream.push(token)
        self.text += new
        found = _find(self.text, self._stops.strings, new=len(new))
        if self._marked is not None:
            found += self._marked.push(token, len(self.text))
        if found:
            at = min(found)
            unfinished = stream.flush() if at == len(self.text) else ""
            self.text = self.text[:at] + unfinished
            self.stop_reason = "stop"


def _top_logprobs(places: Sequence[Top]) -> TopLogprobs:
    tokens, logprobs = zip(*places, strict=True)
    return TopLogprobs(tokens=TensorData(tokens), logprobs=TensorData(logprobs))


def _find(text: str, stop: Sequence[str], *, new: int) -> list[int]:
    """Where each stop string begins that the last `new` characters have completed."""
    found = (text.find(string, max(0, len(text) - new - len(string) + 1)) for string in stop)
    return [at for at in found if at >= 0]


def _begun(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    most = min(max(map(len, stop), default=0) - 1, len(text))
    for size in range(most, 0, -1):
        if any(string.startswith(text[-size:]) for string in stop):
            return size
    return 0


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    name: str,
    tools: Sequence[JsonDict] = (),
) -> list[int]:
    """Tokens of a text (with special tokens) or of a chat (with the generation prompt).

    Args:
        name: of the model, for errors.
        tools: what the model may call, as JSON schemas of functions; of a chat.

    Raises:
        UnsupportedError: messages, and the tokenizer has no chat template; tools, of which its
            template shows nothing.
        InvalidRequestError: the template or the tokenizer refuses it, with its words.
    """
    text = isinstance(prompt, str)
    if not text and not tokenizer.chat_template:
        raise UnsupportedError(
            f"the tokenizer of {name} has no chat template.",
            field="prompt",
            hint="Pass text or tokens.",
        )
    who = "the tokenizer" if text else "the chat template"
    refuses = partial(
        InvalidRequestError,
        field="prompt",
        hint="Mend it, or pass tokens." if text else "Mend the messages, or pass text.",
    )
    # templates are programs, and tokenizers raise plain `Exception`
    with converting(lambda error: refuses(f"{who} of {name} refuses it: {error}")):
        if isinstance(prompt, str):
            return encode_text(tokenizer, prompt)
        messages = [
            {"role": m.role, "content": m.content}
            | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
            for m in prompt
        ]
        render = partial(
            tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        tokens = list(render(tools=list(tools) or None))
        shown = not tools or tokens != list(render())
    if not shown:
        raise UnsupportedError(
            f"the chat template of {name} shows none.",
            field="tools",
            hint="Leave them out, or describe them in a message.",
        )
    return tokens
