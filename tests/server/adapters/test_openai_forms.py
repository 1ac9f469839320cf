"""Texts of a form, over OpenAI's routes and a real model: JSON, choices, calls that must be."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.http.helpers import running
from tests.templates import HERMES, LLAMA, nano_with
from weaver.engine.torch.engine import TorchEngine
from weaver.server.adapters.openai.forms import Structure
from weaver.server.adapters.openai.tools import CallStream, grammar_of, split_calls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

pytest.importorskip("llguidance")
pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
CHAT = {"messages": [{"role": "user", "content": "Is it?"}], "max_tokens": 300, "seed": 1}
ASK = {"prompt": "is it? ", "max_tokens": 300, "seed": 1}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
TEMPLATES = {"hermes": HERMES, "llama": LLAMA}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server with the bundled model, whose template shows no tools, and two that do."""
    root = tmp_path_factory.mktemp("forms")
    models = {name: nano_with(text, root / name) for name, text in TEMPLATES.items()}
    with closing(TorchEngine(models, allow_paths=False, threads=1)) as engine:
        async with running(root, engine=engine) as server, server.http() as http:
            yield http


async def ask(http: httpx.AsyncClient, path: str, *, status: int = 200, **body: Any) -> Any:
    reply = await http.post(f"/v1/{path}", json={"model": "weaver-nano", **body})
    assert reply.status_code == status, reply.text
    return reply.json()


async def said(http: httpx.AsyncClient, **body: Any) -> str:
    (choice,) = (await ask(http, "chat/completions", **CHAT, **body))["choices"]
    assert choice["finish_reason"] == "stop", choice
    return str(choice["message"]["content"])


def fits(text: str) -> bool:
    read = json.loads(text)
    return list(read) == ["answer", "sure"] and read["answer"] in ("yes", "no")


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
    ids=str,
)
async def test_a_reply_keeps_to_a_schema(http: httpx.AsyncClient, form: dict[str, Any]) -> None:
    assert fits(await said(http, **form))
    completed = await ask(http, "completions", **ASK, **form, n=3)
    assert all(fits(choice["text"]) for choice in completed["choices"])


async def test_a_reply_is_json_one_of_some_or_of_a_pattern(http: httpx.AsyncClient) -> None:
    free = await ask(
        http, "chat/completions", **{**CHAT, "response_format": {"type": "json_object"}}
    )
    assert free["choices"][0]["message"]["content"].startswith("{")
    choices = ['"quoted"', "a/b\n", "é"]
    assert await said(http, guided_choice=choices) in choices
    assert await said(http, structured_outputs={"choice": ["only"]}) == "only"
    assert re.fullmatch(r"\d{3}/[ab]", await said(http, guided_regex=r"\d{3}/[ab]"))
    assert await said(http, guided_grammar='start: "x"{4}') == "xxxx"
    plain = await ask(http, "completions", **ASK)
    same = await ask(http, "completions", **ASK, response_format={"type": "text"})
    assert plain["choices"] == same["choices"]


async def test_a_stream_keeps_to_a_schema(http: httpx.AsyncClient) -> None:
    body = {"model": "weaver-nano", "stream": True, **CHAT, "guided_json": SCHEMA}
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
    pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert fits("".join(piece["delta"]["content"] for piece in pieces))
    assert pieces[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("model", TEMPLATES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_must_be_is_made(
    http: httpx.AsyncClient, model: str, stream: bool
) -> None:
    """In the form that the template has, with arguments that keep to the tool's schema."""
    named = {"type": "function", "function": {"name": "add"}}
    for choice, names in ((named, {"add"}), ("required", {"add", "stop"})):
        body = {**CHAT, "model": model, "tools": [ADD, STOP], "tool_choice": choice}
        if stream:
            reply = await http.post("/v1/chat/completions", json={**body, "stream": True})
            lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
            pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
            assert "".join(piece["delta"]["content"] or "" for piece in pieces) == ""
            (last, reason) = pieces[-1]["delta"], pieces[-1]["finish_reason"]
        else:
            (made,) = (await ask(http, "chat/completions", **body))["choices"]
            last, reason = made["message"], made["finish_reason"]
            assert last["content"] is None
        (call,) = last["tool_calls"]
        assert (call["function"]["name"] in names, reason) == (True, "tool_calls")
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "stop":
            assert arguments == {}
        else:
            assert set(arguments) == {"a", "b"}
            assert all(type(v) is int and 0 <= v <= 9 for v in arguments.values())


BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({"response_format": 3}, 400, "response_format"),
    ({"response_format": {}}, 400, "response_format.type"),
    ({"response_format": {"type": "x"}}, 400, "response_format.type"),
    ({"response_format": {"type": "structural_tag"}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, 400, None),
    ({"guided_json": {"type": "nothing"}}, 422, "json_schema"),
    ({"guided_json": "{"}, 422, "json_schema"),
    ({"guided_json": "[]"}, 422, "json_schema"),
    ({"guided_json": 3}, 400, None),
    ({"guided_json": {"description": "x" * 70_000}}, 422, "json_schema"),
    ({"guided_json": {"type": "string", "pattern": "("}}, 422, "json_schema"),
    ({"guided_regex": "("}, 422, "grammar"),
    ({"guided_regex": ""}, 400, "regex"),
    ({"guided_regex": 3}, 400, "guided_regex"),
    ({"guided_choice": []}, 400, "choice"),
    ({"guided_choice": "yes"}, 400, "guided_choice"),
    ({"guided_choice": ["a"] * 1025}, 400, "choice"),
    ({"guided_choice": [3]}, 400, None),
    ({"guided_grammar": "root ::= x"}, 422, "grammar"),
    ({"guided_grammar": ""}, 422, "grammar"),
    ({"guided_whitespace_pattern": " "}, 422, "guided_whitespace_pattern"),
    ({"structured_outputs": 3}, 400, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, 400, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, 400, "response_format"),
    ({"guided_json": {}, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"tools": [ADD], "tool_choice": {"type": "function"}}, 400, "tool_choice"),
    ({"tools": [ADD], "tool_choice": "always"}, 400, "tool_choice"),
    ({"tools": [ADD], "tool_choice": 3}, 400, "tool_choice"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    (
        {
            "tools": [ADD],
            "tool_choice": {"type": "function", "function": {"name": "none"}},
        },
        400,
        "tool_choice",
    ),
    ({"tools": [ADD], "tool_choice": "required", "guided_regex": "a"}, 400, "response_format"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}],
            "tool_choice": "required",
        },
        422,
        "grammar",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: str(case[0])[:60])
async def test_a_form_that_cannot_be_had_is_refused_at_once(
    http: httpx.AsyncClient, case: tuple[dict[str, Any], int, str | None]
) -> None:
    body, status, param = case
    began = time.monotonic()
    answer = await ask(
        http, "chat/completions", status=status, **{**CHAT, "model": "hermes"}, **body
    )
    assert time.monotonic() - began < 1
    assert answer["error"]["message"] and answer["error"]["code"]
    assert param is None or answer["error"]["param"] == param


# --- without a model ------------------------------------------------------------------------------


def test_a_pattern_may_have_slashes_and_lines() -> None:
    for regex, escaped in (
        ("a/b", r"a\/b"),
        (r"a\/b", r"a\/b"),
        (r"\\/", r"\\\/"),
        ("a\n", r"a\n"),
    ):
        assert Structure.of({"regex": regex}).forms == [{"grammar": f"start: /{escaped}/"}]


CODER = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=who>\nMe & you\n"
FORMS: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    ('{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    ('<|python_tag|>{"name": "add", "arguments": {}}', "", [("add", {})]),
    (' [{"name": "add", "arguments": {"a": 1}}]\n', "", [("add", {"a": 1})]),
    (
        '[TOOL_CALLS][{"name": "add", "arguments": {}}, {"name": "stop", "arguments": {}}]',
        "",
        [("add", {}), ("stop", {})],
    ),
    (
        CODER + "</parameter>\n</function>\n</tool_call>",
        "",
        [("add", {"a": 1, "who": "Me & you"})],
    ),
    ('{"name": "Ann", "parameters": {"age": 3}}', None, []),
    ('{"name": "add"}', None, []),
    ('[{"name": "add", "arguments": {}}, 3]', None, []),
    ("[1, 2]", None, []),
    ('so: {"name": "add", "arguments": {}}', None, []),
    ('{"name": "add", "arguments": {}} is it', None, []),
    ('<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', "", [("add", {})]),
    ("[" * 5000, None, []),
]


@pytest.mark.parametrize(("text", "left", "calls"), FORMS, ids=lambda one: str(one)[:40])
@pytest.mark.parametrize("size", [1, 4, 10_000])
def test_each_form_of_a_call_is_read(
    text: str, left: str | None, calls: list[tuple[str, dict[str, Any]]], size: int
) -> None:
    """Whole, and in a stream, however that is cut; what is none stays text."""
    names = ("add", "stop")
    want = text if left is None else left
    whole, found = split_calls(text, names)
    assert whole == want
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found] == calls
    stream = CallStream(names)
    cuts = [text[at : at + size] for at in range(0, len(text), size)]
    told = "".join(stream.push(cut) for cut in cuts[:-1])
    rest, streamed = stream.end(cuts[-1])
    assert told + rest == want
    assert [call["function"] for call in streamed] == [call["function"] for call in found]


def test_a_grammar_has_the_form_that_a_template_shows() -> None:
    functions = [ADD["function"], STOP["function"]]
    assert '"<tool_call>\\n" (call_0 | call_1) "\\n</tool_call>"' in grammar_of(functions, HERMES)
    assert "<tool_call>" not in grammar_of(functions, LLAMA)
    assert "<tool_call>" in grammar_of(functions, "")
