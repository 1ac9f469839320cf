"""Tools: schemas from signatures, calls from replies, and every error told to the model."""

from __future__ import annotations

import asyncio
import functools
import itertools
import sys
import time
from typing import Any, Literal

import anyio
import numpy as np
import pytest

from tests.rl.scripted import CHATML, TOOLS, ScriptedSampler, byte_tokenizer
from weaver.errors import ConfigError
from weaver.types import SamplingParams
from weaver_rl.agent import Agent
from weaver_rl.guard import name_of
from weaver_rl.tools import ToolCall, describe, parse_calls, run_call, schema, use_tools


def multiply(a: int, b: int = 2) -> int:
    """Multiplies two numbers."""
    return a * b


async def search(
    query: str, tags: list[str], mode: Literal["all", "any"], limit: int | None = None
) -> dict[str, str]:
    """Searches."""
    return {"found": query}


def slow() -> str:
    time.sleep(0.5)
    return "late"


def test_schema() -> None:
    assert schema(multiply) == {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiplies two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
    assert schema(search)["function"]["parameters"]["properties"] == {
        "query": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "mode": {"enum": ["all", "any"]},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    }
    assert "Multiplies" in describe([multiply])


def bare(x) -> int:  # type: ignore[no-untyped-def]
    return 1


def odd(x: complex) -> int:
    return 1


@pytest.mark.parametrize(("tool", "match"), [(bare, "no annotation"), (odd, "no JSON type")])
def test_schemas_that_cannot_be_made(tool: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        schema(tool)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('<tool_call>{"name": "multiply", "arguments": {"a": 3}}</tool_call>', "6"),
        (
            '<tool_call>\n{"name": "search", "arguments":'
            ' {"query": "q", "tags": [], "mode": "all"}}\n</tool_call>',
            '{"found": "q"}',
        ),
        ("<tool_call>{nope}</tool_call>", "error: the call is not JSON"),
        ("<tool_call>[]</tool_call>", "error: a call is"),
        ('<tool_call>{"name": "multiply", "arguments": 3}</tool_call>', "error: arguments must"),
        ('<tool_call>{"name": "divide"}</tool_call>', "error: no tool is called 'divide'"),
        ('<tool_call>{"name": "multiply"}</tool_call>', "error: TypeError: missing a required"),
        (
            '<tool_call>{"name": "multiply", "arguments": {"a": null}}</tool_call>',
            "error: TypeError: unsupported operand",
        ),
        ('<tool_call>{"name": "slow"}</tool_call>', "error: slow took longer"),
    ],
)
def test_calls(text: str, result: str) -> None:
    (call,) = parse_calls(f"Let me see. {text} Done.")

    async def run() -> str:
        return await run_call(call, [multiply, search, slow], timeout_s=0.1)

    assert anyio.run(run).startswith(result)


def test_no_call_and_several() -> None:
    assert parse_calls("12 * 34") == []
    call = '<tool_call>{"name": "f"}</tool_call>'
    assert parse_calls(call + call) == [ToolCall("f", {})] * 2


@pytest.mark.parametrize("template", [TOOLS, CHATML])
def test_a_model_uses_a_tool(template: str) -> None:
    says = [
        '<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>',
        "It is 42",
    ]
    tokenizer = byte_tokenizer(template)
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: says[turn])
    agent = Agent(sampler, tokenizer, sampling=SamplingParams(max_tokens=999), seed=1)  # type: ignore[arg-type]

    async def run() -> str:
        if template is CHATML:
            agent.system(describe([multiply]))
        return (await use_tools(agent, "What is 6 * 7?", tools=[multiply])).text

    assert anyio.run(run) == "It is 42"
    assert [m["content"] for m in agent.messages if m["role"] == "tool"] == ["42"]
    assert "Multiplies two numbers." in str(tokenizer.decode(sampler.prompts[0]))
    assert len(agent.trajectory.segments) == 1


def test_rounds_are_bounded() -> None:
    call = '<tool_call>{"name": "multiply", "arguments": {"a": 1}}</tool_call>'
    sampler = ScriptedSampler(byte_tokenizer(TOOLS), lambda turn, prompt: call)
    agent = Agent(
        sampler,  # type: ignore[arg-type]
        sampler.tokenizer,
        sampling=SamplingParams(max_tokens=999),
        seed=1,
    )

    async def run() -> None:
        await use_tools(agent, "Go", tools=[multiply], max_rounds=3)

    anyio.run(run)
    assert agent.trajectory.turns == 3


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


def endless() -> list[object]:
    inner: list[object] = []
    inner.append(inner)
    return inner


async def later() -> str:
    return "later"


class Panic(BaseException):
    """As pyo3 raises where Rust panics."""


def panics() -> None:
    raise Panic("in Rust")


async def cancelled_elsewhere() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        (lambda: {(0, 0): "x"}, '{"(0, 0)": "x"}'),
        (lambda: np.array([1, 2]), "[1, 2]"),
        (lambda: np.float32(0.5), "0.5"),
        (lambda: {"b", "a"}, '["a", "b"]'),
        (lambda: b"x", '''"b'x'"'''),
        (lambda: "half \ud83d of it", "half ? of it"),
        (lambda: {"half": "\ud83d"}, '{"half": "\\ud83d"}'),
        (lambda: float("nan"), "null"),
        (lambda: None, "null"),
        (later, "later"),
        (lambda: later(), "later"),
        (functools.partial(later), "later"),
        (lambda: endless(), "[[...]]"),
        (lambda: Mute(), "error: the result, a Mute, has no text"),
        (lambda: 10**5000, "error: the result, a int, has no text"),
        (panics, "error: Panic: in Rust"),
        (cancelled_elsewhere, "error: CancelledError: "),
        (lambda: sys.exit(3), "error: SystemExit: 3"),
    ],
    ids=itertools.count(),
)
def test_every_result_becomes_a_text(tool: Any, text: str) -> None:
    call = ToolCall(name_of(tool), {})
    assert asyncio.run(run_call(call, [tool])) == text


@pytest.mark.parametrize(
    "text",
    ["[" * 20_000, '{"a":' * 20_000, "1" * 5000, "null", '"x"', '{"name": 1}', "", "\ud83d", "{"],
    ids=itertools.count(),
)
def test_every_call_that_cannot_be_read_says_so(text: str) -> None:
    [call] = parse_calls(f"<tool_call>{text}</tool_call>")
    assert call.error
    assert asyncio.run(run_call(call, [])).startswith("error: ")
