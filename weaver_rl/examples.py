"""Rows of a data set as supervised examples: what each form says, checked before it is encoded.

`conversations.to_datum` reads its rows here, whose docs show the forms, and agents their messages.
Rows may be of the usual other format (`conversations` of `from` and `value`), and fields may be
null, as `datasets` fills those that a row lacks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from weaver.errors import InvalidRequestError
from weaver_rl.data import check_unicode

FORMS = "Give prompt and completion, messages, or text; other fields count for nothing."
MESSAGE = 'A message is {"role": "user", "content": "..."}.'
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles by the names that `from` has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """`Chat(messages=({"role": "user", "content": "Hi"}, ...), where="examples[3].messages")`"""

    messages: tuple[dict[str, Any], ...]
    where: str
    """The messages' field, `"examples[3].messages"`."""
    learned_from: int = 0
    """The first message that may be learned."""
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other variables of the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters that are learned."""


def read_example(row: Any, *, where: str) -> Chat | Completion | Text:
    """Which form a row has, and what it says.

    Raises:
        InvalidRequestError: none, or a broken one; names the field below `where`.
    """
    if not hasattr(row, "keys"):
        _refuse(where, f"is a {type(row).__name__}.", FORMS)
    check_unicode(row, field=where)
    given = {name: row[name] for name in row.keys() if row[name] is not None}
    chat = next((name for name in ("messages", "conversations") if name in given), None)
    if chat is not None:
        field = f"{where}.{chat}"
        messages = read_messages(given[chat], field)
        system = given.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        return Chat(messages=messages, where=field, **_template(given, where))
    if "prompt" in given and "completion" in given:
        prompt, completion = given["prompt"], given["completion"]
        if isinstance(prompt, str) or isinstance(completion, str):
            return Completion(
                prompt=_text(prompt, f"{where}.prompt"),
                completion=_text(completion, f"{where}.completion"),
            )
        before = read_messages(prompt, f"{where}.prompt")
        behind = read_messages(completion, f"{where}.completion")
        return Chat(
            messages=(*before, *behind),
            where=f"{where}.prompt + completion",
            learned_from=len(before),
            **_template(given, where),
        )
    if "text" in given:
        text = _text(given["text"], f"{where}.text")
        return Text(text=text, spans=_spans(given.get("spans"), text, f"{where}.spans"))
    names = ", ".join(f"{name!r}" if name in given else f"{name!r} (null)" for name in row.keys())
    _refuse(where, f"has the fields {names or 'none'}.", FORMS)


def _template(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row says to the chat template beside its messages."""
    tools = given.get("tools", ())
    if isinstance(tools, str):  # Parquet has no lists of differing objects
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            _refuse(f"{where}.tools", f"is not JSON: {error}.", "Give a list of schemas.")
    listed = isinstance(tools, Iterable) and not isinstance(tools, Mapping)
    if not listed or not all(hasattr(tool, "keys") for tool in tools):
        _refuse(f"{where}.tools", f"is {tools!r:.80}.", "Give a list of JSON schemas.")
    if "functions" in given and "tools" not in given:
        hint = 'Write tools: [{"type": "function", "function": {...}}, ...].'
        _refuse(f"{where}.functions", "is not read.", hint)
    options = given.get("chat_template_kwargs", {})
    if not hasattr(options, "keys"):
        _refuse(f"{where}.chat_template_kwargs", f"is {options!r:.80}.", "Give an object.")
    return {"tools": tuple(map(_without_nulls, tools)), "options": dict(options)}


def read_messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Chat messages with roles and contents, without nulls. Raises as `read_example`."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        _refuse(where, f"is a {type(value).__name__}.", f"Give a list of messages. {MESSAGE}")
    messages = tuple(_message(one, f"{where}[{i}]") for i, one in enumerate(value))
    if not messages:
        _refuse(where, "has no messages.", "Leave the row out.")
    return messages


def _message(value: Any, where: str) -> dict[str, Any]:
    if not hasattr(value, "keys"):
        _refuse(where, f"is a {type(value).__name__}.", MESSAGE)
    message = {str(name): value[name] for name in value.keys() if value[name] is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            _refuse(f"{where}.from", f"is {speaker!r}.", f"Known: {', '.join(SPEAKERS)}.")
        message |= {"role": SPEAKERS[speaker], "content": message.pop("value", None)}
    if not isinstance(message.get("role"), str):
        _refuse(f"{where}.role", f"is {message.get('role')!r}.", MESSAGE)
    if message.get("weight", 1) not in (0, 1):
        _refuse(f"{where}.weight", f"is {message['weight']!r}.", "1 is learned, 0 is not.")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, Iterable) or isinstance(calls, str | Mapping):
            _refuse(f"{where}.tool_calls", f"is {calls!r:.80}.", "Give a list of calls.")
        message["tool_calls"] = [_without_nulls(call) for call in calls]
    message["content"] = _content(message, where)
    return message


def _content(message: Mapping[str, Any], where: str) -> str | list[dict[str, Any]] | None:
    """A text; a list of parts that are texts; None beside calls of tools."""
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        _refuse(f"{where}.content", "is null or missing.", "Give a text, or tool_calls beside it.")
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Iterable):
        _refuse(f"{where}.content", f"is a {type(content).__name__}.", "Give a text.")
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if hasattr(part, "get") else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            place, hint = f"{where}.content[{i}]", 'Only {"type": "text", "text": "..."} is read.'
            _refuse(place, f"is a part of type {kind!r}.", hint)
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column the fields of all others, as nulls."""
    if hasattr(value, "keys"):
        items = ((name, value[name]) for name in value.keys())
        return {name: _without_nulls(item) for name, item in items if item is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list | np.ndarray) else value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"is a {type(value).__name__}.", "Give a text.")
    return value


def _spans(value: Any, text: str, where: str) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ((0, len(text)),)
    try:
        spans = tuple((int(start), int(end)) for start, end in value)
    except (TypeError, ValueError):
        _refuse(where, f"is {value!r:.80}.", "Give pairs of characters, [[4, 9]].")
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            message = f"has the span [{start}, {end}] in {len(text)} characters."
            _refuse(where, message, "Spans ascend and do not overlap.")
    if any(one[1] > two[0] for one, two in pairwise(spans)):
        _refuse(where, "has a span before the last one's end.", "Spans ascend and do not overlap.")
    return spans


def _refuse(where: str, message: str, hint: str) -> NoReturn:
    raise InvalidRequestError(message, field=where, hint=hint)
