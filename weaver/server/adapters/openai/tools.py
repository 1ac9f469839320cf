"""Calls of tools in what a model says, in the form that templates of Qwen and Hermes teach.

<tool_call>{"name": "multiply", "arguments": {"a": 12, "b": 34}}</tool_call>
"""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weaver.types import JsonDict

OPENS = "<tool_call>"
CALL = re.compile(rf"{OPENS}(.*?)</tool_call>", re.DOTALL)


def split_calls(text: str) -> tuple[str, list[JsonDict]]:
    """What is said beside the calls, and the calls; what cannot be read as one stays text."""
    calls: list[JsonDict] = []

    def take(found: re.Match[str]) -> str:
        try:
            given = json.loads(found[1])
            called = {"name": str(given["name"]), "arguments": json.dumps(given["arguments"])}
        except (ValueError, KeyError, TypeError):
            return found[0]
        calls.append({"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": called})
        return ""

    said = CALL.sub(take, text)
    return (said.strip() if calls else said), calls


def certain(text: str) -> int:
    """How many characters of an unfinished text are no part of a call."""
    opened = text.find(OPENS)
    if opened >= 0:
        return opened
    for size in range(min(len(OPENS) - 1, len(text)), 0, -1):
        if OPENS.startswith(text[-size:]):
            return len(text) - size
    return len(text)
