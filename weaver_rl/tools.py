"""Tools: plain annotated functions that a model may call. Environments use them.

    def multiply(a: int, b: int) -> int:
        "Multiplies two numbers."
        return a * b

    reply = await use_tools(agent, "What is 12 * 34?", tools=[multiply])

The schema comes from the signature, the description from the docstring. A call is read in the form
that chat templates of Qwen and Hermes teach:

    <tool_call>{"name": "multiply", "arguments": {"a": 12, "b": 34}}</tool_call>
"""

from __future__ import annotations

import inspect
import json
import re
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any, NamedTuple

import anyio

from weaver.errors import ConfigError
from weaver.threads import in_daemon_thread
from weaver_rl.agent import Agent
from weaver_rl.clock import spend
from weaver_rl.guard import attempt, attempt_async, is_async, name_of
from weaver_rl.storage import plain
from weaver_rl.types import Failure, Reply

__all__ = ["describe", "use_tools"]

Tool = Callable[..., Any]
JSON_TYPES: Mapping[object, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class ToolError(Exception):
    """Why a call failed, in words for the model."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model asked for: `ToolCall("multiply", {"a": 12, "b": 34})`; or why it is no call."""

    name: str
    arguments: Mapping[str, Any]
    error: str = ""


def schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a function, in the form that chat templates take; or its `json_schema`.

    Raises:
        ConfigError: an argument has no annotation, or one that JSON does not know.
    """
    own = getattr(tool, "json_schema", None)
    if own is not None:
        return dict(own)
    hints = typing.get_type_hints(tool)
    parameters = inspect.signature(tool).parameters
    properties: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name not in hints or parameter.kind not in NAMED:
            raise ConfigError(
                f"argument {name!r} of {name_of(tool)} has no annotation or cannot be named.",
                field="tools",
                hint="Annotate every argument: `def add(a: int, b: int)`.",
            )
        properties[name] = _json_type(hints[name], f"{name_of(tool)}.{name}")
    required = [name for name, one in parameters.items() if one.default is one.empty]
    function = {
        "name": name_of(tool),
        "description": inspect.getdoc(tool) or "",
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return {"type": "function", "function": function}


def describe(tools: Sequence[Tool]) -> str:
    """A system message for models whose chat template does not show tools."""
    lines = "\n".join(json.dumps(schema(tool)["function"]) for tool in tools)
    form = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
    return f"You may call these functions:\n{lines}\nTo call one, write {form}"


def parse_calls(text: str) -> list[ToolCall]:
    """The calls in a reply, in order; one that cannot be read carries its error."""
    return [_parse(match.group(1)) for match in CALL.finditer(text)]


async def run_call(call: ToolCall, tools: Sequence[Tool], *, timeout_s: float = 30.0) -> str:
    """What the tool returned, as text; every error is a text for the model, never raised.

    What is no text becomes JSON, what has no such form its own text.
    """
    begin = time.monotonic()
    said = await _said(call, tools, timeout_s=timeout_s)
    spend("tool", time.monotonic() - begin)
    if said.failed:
        spend("tool_failed", time.monotonic() - begin)
    return said.text


class _Said(NamedTuple):
    text: str
    failed: bool = True


async def _said(call: ToolCall, tools: Sequence[Tool], *, timeout_s: float) -> _Said:
    if call.error:
        return _Said(f"error: {call.error}")
    known = {name_of(tool): tool for tool in tools}
    if call.name not in known:
        return _Said(f"error: no tool is called {call.name!r}; there are {', '.join(known)}")
    with anyio.move_on_after(timeout_s):
        value = await _use(known[call.name], call.arguments)
        # after a failure the model may try again
        if isinstance(value, Failure):
            return _Said(_text(f"error: {value.message}"))
        return _Said(_text(value), failed=False)
    return _Said(f"error: {call.name} took longer than {timeout_s:g} s")


async def use_tools(
    agent: Agent, text: str, *, tools: Sequence[Tool], max_rounds: int = 8, timeout_s: float = 30.0
) -> Reply:
    """Says `text`, then runs the calls of each reply and says their results, until one has none.

    At most `max_rounds` replies; the last one is returned, whatever it says. Where the template
    does not show tools, call `agent.system(describe(tools))` first.
    """
    if "tools" in str(getattr(agent.tokenizer, "chat_template", "")):
        agent.show_tools([schema(tool) for tool in tools])
    reply = await agent.chat(text)
    for _ in range(max_rounds - 1):
        calls = parse_calls(agent.messages[-1]["content"])  # its text would lack special tokens
        if not calls:
            break
        results = [await run_call(call, tools, timeout_s=timeout_s) for call in calls]
        reply = await agent.respond([{"role": "tool", "content": result} for result in results])
    return reply


def _parse(text: str) -> ToolCall:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall("", {}, f"the call is not JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall("", {}, 'a call is {"name": "...", "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], {}, "arguments must be an object")
    return ToolCall(call["name"], arguments)


async def _use(tool: Tool, arguments: Mapping[str, Any]) -> Any:
    """What a tool answers, awaited where it can be, or the `Failure`."""

    def call() -> Any:
        inspect.signature(tool).bind(**arguments)
        return tool(**arguments)

    if is_async(tool):
        return await attempt_async(call, "tool")
    value = await in_daemon_thread(partial(attempt, call, "tool"))
    return await attempt_async(lambda: value, "tool") if inspect.isawaitable(value) else value


def _text(value: Any) -> str:
    """For the model: text as it is, JSON where there is such a form; whole Unicode."""
    for form in (_plain_text, str):
        text = attempt(partial(form, value), "tool")
        if isinstance(text, str):
            return text.encode("utf-8", "replace").decode()
    return f"error: the result, a {type(value).__name__}, has no text"


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value))


def _json_type(hint: object, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, UnionType):
        return {"anyOf": [_json_type(argument, where) for argument in arguments]}
    if hint is type(None):
        return {"type": "null"}
    kind = JSON_TYPES.get(origin or hint)
    if kind is None:
        raise ConfigError(
            f"{hint!r} has no JSON type.",
            field=where,
            hint="Use str, int, float, bool, list, dict, Literal or a union of them.",
        )
    items = {"items": _json_type(arguments[0], where)} if kind == "array" and arguments else {}
    return {"type": kind, **items}
