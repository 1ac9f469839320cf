"""Where a client's history goes on: which recorded conversation it extends, token by token.

A client tells its whole history with every request, as it was told the replies: without special
tokens, calls of tools taken apart. So histories are compared message by message, in the client's
form, and what follows is rendered behind the recorded replies. `weaver_rl.endpoint.answers` calls
it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from weaver.errors import InvalidRequestError
from weaver_rl.agent import Agent
from weaver_rl.conversations import render
from weaver_rl.recorded import Conversation

Message = Mapping[str, Any]
Key = tuple[str, str, str]
"""Of a message: role, content, and the calls of tools, without their ids."""


class Point(NamedTuple):
    """Behind a reply: how much of a conversation that is."""

    messages: int
    rows: int
    text: int


@dataclass(slots=True, eq=False)
class Line:
    """A conversation as its client knows it, up to the last reply."""

    talk: Conversation
    said: list[Key]
    points: list[Point]

    def replied(self, reply: Message) -> None:
        """Remembers what the client was told, once the conversation has it."""
        talk = self.talk
        self.said.append(key_of(reply))
        self.points.append(Point(len(talk.messages), len(talk.rows), len(talk.text)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Where the next reply begins; nothing of it is recorded until there is one."""

    line: Line
    messages: list[Message]
    said: list[Key]
    text: str
    """What the model has still to read."""
    tokens: list[int]

    @property
    def prompt(self) -> tuple[int, ...]:
        return (*self.line.talk.tokens, *self.tokens)

    def read(self) -> Line:
        """Records that it was read."""
        line = self.line
        line.talk.messages = list(self.messages)
        line.said = list(self.said)
        line.talk.read(self.text, self.tokens)
        return line


def key_of(message: Message) -> Key:
    """Replies are compared without the space around them, which many programs take away."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    content = message.get("content") or ""
    if message["role"] == "assistant":
        content = content.strip()
    read = [[call["name"], _read(call["arguments"])] for call in calls]
    return message["role"], content, json.dumps(read, sort_keys=True)


def opening(
    agent: Agent, lines: Sequence[Line], messages: Sequence[Message], tools: Sequence[Any]
) -> Opening:
    """
    Raises:
        ConfigError: the model has no chat template, or it does not show tools.
        InvalidRequestError: the template refuses the messages.
    """
    said = [key_of(message) for message in messages]
    found = _longest(lines, said)
    whole = list(messages)
    line = Line(Conversation(tokenizer=agent.tokenizer), [], [])
    full: str | None = None
    if found is not None:
        begun, point = found
        whole[: point.messages] = begun.talk.messages[: point.messages]
        with suppress(InvalidRequestError):  # of replies as they are, where it wants them parsed
            full = render(agent.tokenizer, whole, tools=tools)
        if full is not None and full.startswith(begun.talk.text[: point.text]):
            line = begun
            if point.rows < len(begun.talk.rows):  # it was answered before, or was gone on with
                line = Line(begun.talk.reread(**point._asdict()), [], [])
        else:
            line.talk.first = point.messages if full is not None else 0
    if full is None:
        whole = list(messages)
        full = render(agent.tokenizer, whole, tools=tools)
    text = full[len(line.talk.text) :]
    tokens = line.talk.encoded(text)
    return Opening(line=line, messages=whole, said=said, text=text, tokens=tokens)


def _longest(lines: Sequence[Line], said: Sequence[Key]) -> tuple[Line, Point] | None:
    """The latest of those that have most of the history."""
    best: tuple[Line, Point] | None = None
    for line in lines:
        for point in line.points:
            size = point.messages
            if (best is None or size >= best[1].messages) and line.said[:size] == said[:size]:
                best = line, point
    return best


def _read(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
