"""Calls of tools in what a model says, in the forms that chat templates teach.

Those of Qwen and Hermes, `<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>`; of Qwen's
coders, `<tool_call><function=add><parameter=a>1</parameter></function></tool_call>`; and those of
Llama and Mistral, whose whole reply is JSON: `{"name": "add", "parameters": {"a": 1}}`, or a list.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from weaver.types import JsonDict

OPENS, CLOSES = "<tool_call>", "</tool_call>"
CALL = re.compile(rf"{OPENS}(.*?){CLOSES}", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
MARKS = ("<|python_tag|>", "[TOOL_CALLS]")
"""What may stand before a reply that is JSON; most tokenizers have special tokens for them."""
SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""Of arguments, as templates show calls of earlier turns."""
NOTHING = {"properties": {}, "additionalProperties": False}
"""What a function without `parameters` takes."""
BEGINNINGS = ("{", "[", *MARKS)


def split_calls(text: str, names: Collection[str]) -> tuple[str, list[JsonDict]]:
    """What is said beside the calls, and the calls; what cannot be read as one stays text.

    `names` are those of the tools, for replies that may be JSON of another kind.
    """
    calls: list[JsonDict] = []

    def take(found: re.Match[str]) -> str:
        read = _called(_json(found[1])) or _written(found[1])
        if read is None:
            return found[0]
        calls.append(read)
        return ""

    said = CALL.sub(take, text)
    if calls:
        return said.strip(), calls
    whole = text.strip()
    for mark in MARKS:
        whole = whole.removeprefix(mark).strip()
    given = _json(whole)
    read = [_called(one) for one in (given if isinstance(given, list) else [given])]
    known = [one for one in read if one is not None and one["function"]["name"] in names]
    return ("", known) if known and len(known) == len(read) else (text, [])


def grammar_of(functions: Sequence[Mapping[str, Any]], template: str) -> str:
    """Of one call of one of these, in the form that a chat template teaches, as far as it tells.

    Each has a `name` and `parameters`, a JSON schema.
    """
    bare = OPENS not in template and '"parameters"' in template
    key = "parameters" if bare else "arguments"
    lines = []
    for i, function in enumerate(functions):
        opening = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        lines.append(f'call_{i}: {json.dumps(opening)} args_{i} "}}"')
        schema = {"type": "object", **(function.get("parameters") or NOTHING)}
        schema["x-guidance"] = SPACING
        lines.append(f"args_{i}: %json {json.dumps(schema)}")
    either = " | ".join(f"call_{i}" for i in range(len(functions)))
    around = (f'"{OPENS}\\n" ', f' "\\n{CLOSES}"') if not bare else ("", "")
    return "\n".join([f"start: {around[0]}({either}){around[1]}", *lines])


@dataclass(slots=True)
class CallStream:
    """The calls in a reply that comes in pieces."""

    names: Collection[str]
    _held: str = field(default="", init=False)
    """What may be a call."""
    _begun: bool = field(default=False, init=False)
    """Whether something was said, so that the reply is not JSON alone."""

    def push(self, text: str) -> str:
        """What is no part of a call for certain."""
        self._held += text
        size = self._certain()
        said, self._held = self._held[:size], self._held[size:]
        self._begun = self._begun or bool(said)
        return said

    def end(self, text: str) -> tuple[str, list[JsonDict]]:
        """The rest, and the calls."""
        return split_calls(self._held + text, () if self._begun else self.names)

    def _certain(self) -> int:
        text = self._held
        start = text.lstrip()
        if not self._begun and any(
            start.startswith(one) or one.startswith(start) for one in BEGINNINGS
        ):
            return 0
        opened = text.find(OPENS)
        if opened >= 0:
            return opened
        for size in range(min(len(OPENS) - 1, len(text)), 0, -1):
            if OPENS.startswith(text[-size:]):
                return len(text) - size
        return len(text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _called(given: Any) -> JsonDict | None:
    """A call of its JSON."""
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = given.get("arguments", given.get("parameters"))
    if isinstance(arguments, str):  # some write them as JSON in JSON
        arguments = _json(arguments)
    return _call(given["name"], arguments) if isinstance(arguments, dict) else None


def _written(text: str) -> JsonDict | None:
    """A call as Qwen's coders write it; what is no JSON is text."""
    found = FUNCTION.fullmatch(text)
    if found is None:
        return None
    values = {}
    for name, value in PARAMETER.findall(found[2]):
        read = _json(value)
        values[name] = value if read is None and value.strip() != "null" else read
    return _call(found[1], values)


def _call(name: str, arguments: Mapping[str, Any]) -> JsonDict:
    called = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": called}
