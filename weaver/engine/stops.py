"""When a sequence ends, and its text as it grows; `TorchSampler` has one `Continuation` a row.

Text is decoded token by token only where a stop string or a reader of deltas needs it. A byte-level
token may hold part of a character and a stop string may span tokens, so what could still change, or
become part of a stop string, is held back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.engine.base import Tokenizer
    from weaver.types import StopReason

_REPLACEMENT = "\ufffd"
_WINDOW = 16


class TextStream:
    """Decodes tokens as they come; what it has answered never changes.

    Decoders may strip the space before the first token, so tokens are decoded behind earlier ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._whole = 0
        """Tokens of the window that end with a whole character."""
        self._answered = 0
        """Characters of the window."""

    def push(self, token: int) -> str:
        """The text that became certain; special tokens have none."""
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

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class Continuation:
    """The tokens of one sample as they are drawn, its text and the reason why it ended.

    `length` is the most tokens it may have. Without stop strings and `stream`, the text is decoded
    once, at the end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        length: int,
        stop: Sequence[str],
        stop_token_ids: frozenset[int],
        stream: bool,
    ) -> None:
        self.tokens: list[int] = []
        self.stop_reason: StopReason | None = None
        self._tokenizer = tokenizer
        self._length = length
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._stop_token_ids = stop_token_ids
        self._stream = TextStream(tokenizer) if stop or stream else None
        self._text = ""
        self._sent = 0

    def push(self, token: int) -> str:
        """Takes the next token and answers the text that a reader may see now."""
        self.tokens.append(token)
        ended_by_token = token in self._stop_token_ids
        if self._stream is not None and not ended_by_token:
            self._grow(self._stream.push(token))
        if self.stop_reason is None:
            if ended_by_token or len(self.tokens) == self._length:
                self.stop_reason = "stop" if ended_by_token else "length"
                self._finish(ended_by_token)
        end = len(self._text)
        if self.stop_reason is None:
            end -= self._held()
        new = self._text[self._sent : end]
        self._sent = end
        return new

    @property
    def text(self) -> str:
        """Complete once `stop_reason` is set: before the stop string or token, without specials."""
        return self._text

    def _finish(self, ended_by_token: bool) -> None:
        if self._stream is not None:
            self._text += self._stream.flush()
        else:
            tokens = self.tokens[:-1] if ended_by_token else self.tokens
            self._text = self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _grow(self, text: str) -> None:
        start = max(0, len(self._text) - self._longest + 1)
        self._text += text
        found = [at for stop in self._stop if (at := self._text.find(stop, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stop_reason = "stop"

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        most = min(self._longest - 1, len(self._text))
        for size in range(most, 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stop):
                return size
        return 0
