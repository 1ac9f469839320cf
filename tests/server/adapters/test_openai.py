"""OpenAI's protocol over a fake engine, whose tokens are bytes: answers, streams, refusals."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import running
from weaver import types
from weaver.protocol import CreateModel, ModelCreated, SaveCheckpoint
from weaver.server.adapters.openai.answers import Writer
from weaver.server.http.caller_session import CallerSession, Note

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx

    from tests.server.http.helpers import Server

pytestmark = pytest.mark.anyio
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path) as server:
        yield server


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.http() as http:
        yield http


async def ask(http: httpx.AsyncClient, path: str, *, status: int = 200, **body: Any) -> Any:
    reply = await http.post(f"/v1/{path}", json={"model": "fake", **body})
    assert reply.status_code == status, reply.text
    return reply.json()


async def events(http: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    given = {"model": "fake", "stream": True, **body}
    async with http.stream("POST", f"/v1/{path}", json=given) as reply:
        assert reply.status_code == 200
        lines = [line async for line in reply.aiter_lines() if line.startswith("data: ")]
    assert all(line.isascii() for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --- answers --------------------------------------------------------------------------------------


async def test_a_chat_is_answered_with_tokens_as_they_were_sampled(http: httpx.AsyncClient) -> None:
    given = {"messages": CHAT, "max_tokens": 5, "seed": 1, "n": 2, "ignore_eos": True}
    answer = await ask(http, "chat/completions", **given, logprobs=True, return_token_ids=True)
    assert (answer["object"], answer["model"]) == ("chat.completion", "fake")
    assert bytes(answer["prompt_token_ids"]) == b"user: hi\nassistant: "
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] == "length"
        scored = choice["logprobs"]["content"]
        assert len(choice["token_ids"]) == len(scored) == 5
        assert all(token["logprob"] <= 0 for token in scored)
    prompt = len(answer["prompt_token_ids"])
    usage = {"prompt_tokens": prompt, "completion_tokens": 10, "total_tokens": prompt + 10}
    assert answer["usage"] == usage
    again = await ask(http, "chat/completions", **given)
    assert [c["message"] for c in again["choices"]] == [c["message"] for c in answer["choices"]]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    same = await ask(http, "chat/completions", **{**given, "messages": parts})
    assert [c["message"] for c in same["choices"]] == [c["message"] for c in answer["choices"]]


async def test_completions_take_texts_and_tokens(http: httpx.AsyncClient) -> None:
    given = {"max_tokens": 4, "seed": 1, "ignore_eos": True}
    (text,) = (await ask(http, "completions", prompt="ab", **given))["choices"]
    (tokens,) = (await ask(http, "completions", prompt=[97, 98], **given))["choices"]
    assert text == tokens
    answer = await ask(http, "completions", prompt=["ab", "c"], n=2, logprobs=0, **given)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["text"] == text["text"]
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 4
    assert answer["usage"]["prompt_tokens"] == 3
    whole = await ask(http, "completions", prompt=[[97, 98]], return_token_ids=True, **given)
    assert whole["choices"][0]["prompt_token_ids"] == [97, 98]
    assert (await ask(http, "completions", prompt="ab"))["usage"]["completion_tokens"] <= 16


async def test_a_chat_shows_the_likeliest_tokens(http: httpx.AsyncClient) -> None:
    given = {"messages": CHAT, "max_tokens": 4, "seed": 1, "n": 2, "logprobs": True}
    answer = await ask(http, "chat/completions", **given, top_logprobs=3)
    for choice in answer["choices"]:
        for token in choice["logprobs"]["content"]:
            assert len(token["top_logprobs"]) == 3
            values = [one["logprob"] for one in token["top_logprobs"]]
            assert values == sorted(values, reverse=True) and values[0] >= token["logprob"]
            assert all(one["token"].startswith("token_id:") for one in token["top_logprobs"])
    whole = [c["logprobs"]["content"] for c in answer["choices"]]
    streamed = await events(http, "chat/completions", **given, top_logprobs=3)
    for index, content in enumerate(whole):
        pieces = [p for e in streamed for p in e["choices"] if p["index"] == index]
        assert [t for p in pieces for t in p["logprobs"]["content"]] == content
    plain = await ask(http, "chat/completions", **given)
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_completion_repeats_its_prompt_and_scores_it(http: httpx.AsyncClient) -> None:
    """As lm-eval asks: its tokens, and whether each was the likeliest."""
    given = {"prompt": ["abc", "d"], "temperature": 0, "logprobs": 2, "echo": True}
    for more in (1, 0):
        answer = await ask(http, "completions", **given, max_tokens=more)
        assert [c["index"] for c in answer["choices"]] == [0, 1]
        for choice, prompt in zip(answer["choices"], given["prompt"], strict=True):
            shown = choice["logprobs"]
            assert choice["text"].startswith(prompt) and len(choice["text"]) == len(prompt) + more
            assert len(shown["tokens"]) == len(prompt) + more
            assert shown["tokens"][: len(prompt)] == [f"token_id:{t}" for t in prompt.encode()]
            assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
            ends = [0, *(len("".join(shown["tokens"][: i + 1])) for i in range(len(prompt)))]
            assert shown["text_offset"] == ends[: len(shown["tokens"])]
            for token, value, top in list(
                zip(*(shown[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
            )[1:]:
                assert 2 <= len(top) <= 3 and top[token] == pytest.approx(value)
                assert max(top.values()) >= value
        assert answer["usage"]["completion_tokens"] == 2 * more
    tokens = await ask(http, "completions", **{**given, "prompt": [[97, 98, 99], [100]]})
    assert tokens["choices"][0]["logprobs"]["tokens"][:3] == [
        "token_id:97",
        "token_id:98",
        "token_id:99",
    ]
    two = await ask(http, "completions", **given, max_tokens=0, n=2)
    assert [c["text"] for c in two["choices"]] == ["abc", "abc", "d", "d"]
    plain = await ask(http, "completions", prompt="ab", echo=True, max_tokens=2, seed=1)
    (choice,) = plain["choices"]
    assert choice["logprobs"] is None and choice["text"].startswith("ab")
    (bare,) = (await ask(http, "completions", prompt="ab", logprobs=0, echo=True))["choices"]
    assert bare["logprobs"]["top_logprobs"] is None and len(bare["logprobs"]["tokens"]) > 2


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_a_stream_has_the_same_tokens(http: httpx.AsyncClient, path: str) -> None:
    prompt: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": "hi"}
    given = {**prompt, "max_tokens": 6, "seed": 2, "n": 2, "return_token_ids": True}
    whole = await ask(http, path, **given)
    streamed = await events(http, path, **given, stream_options={"include_usage": True})
    assert streamed[-1]["usage"] == whole["usage"]
    assert streamed[-1]["choices"] == []
    for choice in whole["choices"]:
        pieces = [p for e in streamed for p in e["choices"] if p["index"] == choice["index"]]
        assert [t for piece in pieces for t in piece["token_ids"]] == choice["token_ids"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        if "chat" in path:
            assert pieces[0]["delta"]["role"] == "assistant"
            assert all("role" not in piece["delta"] for piece in pieces[1:])
            text = "".join(piece["delta"]["content"] for piece in pieces)
            assert text == choice["message"]["content"]
        else:
            assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert "usage" not in (await events(http, path, **given))[-1]


async def test_who_leaves_has_the_sample_cancelled(tmp_path: Path) -> None:
    engine = FakeEngine(hook=lambda name, _: time.sleep(0.05) if name == "step" else None)
    async with running(tmp_path, engine=engine) as server, server.http() as http:
        with anyio.move_on_after(0.3):
            body = {"messages": CHAT, "max_tokens": 200, "ignore_eos": True}
            await ask(http, "chat/completions", **body)
        (session,) = await server.service.list_sessions()
        outcomes = await server.service.collect(session.session_id, after=0, timeout_s=5)
        assert [one.error and one.error.code for one in outcomes] == ["cancelled"]


# --- tools ----------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


async def test_tools_and_calls_reach_the_template(http: httpx.AsyncClient) -> None:
    given = {"messages": CHAT, "max_tokens": 2, "return_token_ids": True}
    shown = await ask(http, "chat/completions", tools=[TOOL], **given)
    assert b"'name': 'add'" in bytes(shown["prompt_token_ids"])
    hidden = await ask(http, "chat/completions", tools=[TOOL], tool_choice="none", **given)
    assert b"add" not in bytes(hidden["prompt_token_ids"])


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        ("plain", "plain", []),
        (CALL, "", ["add"]),
        (f"I add. {CALL}\n{CALL}", "I add.", ["add", "add"]),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        ("<tool_call>3</tool_call>", "<tool_call>3</tool_call>", []),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>never ends", "<tool_call>never ends", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_calls_are_told_apart_from_what_is_said(
    text: str, said: str, names: list[str], size: int
) -> None:
    """Whole, and in a stream, however that is cut."""

    def writer() -> Writer:
        head: dict[str, Any] = {"id": "a", "created": 0, "model": "m", "tokenizer": None}
        return Writer(**head, chat=True, logprobs=False, token_ids=False, tools=["add"])

    sequence = types.SampledSequence(
        tokens=(1,), text=text, logprobs=(0.0,), sampling_logprobs=(0.0,), stop_reason="stop"
    )
    whole = writer().whole([types.SampleResult(sequences=(sequence,))])["choices"][0]
    assert (whole["message"]["content"] or "") == said
    assert [c["function"]["name"] for c in whole["message"].get("tool_calls", [])] == names
    assert whole["finish_reason"] == ("tool_calls" if names else "stop")
    cuts = [text[at : at + size] for at in range(0, len(text), size)]
    deltas = [
        types.SampleDelta(index=0, tokens=(1,), text=piece, logprobs=(0.0,)) for piece in cuts
    ]
    deltas[-1] = deltas[-1].model_copy(update={"stop_reason": "stop"})
    streaming, choices = writer(), []
    for delta in deltas:
        for line in streaming.pieces([delta]).splitlines():
            if line:
                choices += json.loads(line.removeprefix("data: "))["choices"]
    assert "".join(c["delta"]["content"] for c in choices).strip() == said
    calls = [call for c in choices for call in c["delta"].get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls] == names
    assert [call["index"] for call in calls] == list(range(len(names)))
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in calls)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


# --- models ---------------------------------------------------------------------------------------


async def test_a_name_is_a_base_model_a_run_or_a_checkpoint(
    server: Server, http: httpx.AsyncClient
) -> None:
    caller = CallerSession(server.service, server.gateway)
    created = await caller.carry_out(CreateModel(base_model="fake", name="words"), Note())
    assert isinstance(created, ModelCreated)
    run_id = created.run.run_id
    none = await ask(http, "completions", model=run_id, prompt="a", status=404)
    assert "no checkpoint" in none["error"]["message"]
    for name in ("a", "b"):
        operation = SaveCheckpoint(purpose="sampler", name=name)
        await caller.wait(await caller.submit(operation, Note(), run_id=run_id), 5)
    path = f"weaver://{run_id}/sampler/b"
    listed = (await http.get("/v1/models")).json()
    assert {"fake", run_id, "words", path} <= {model["id"] for model in listed["data"]}
    assert listed["object"] == "list"
    shown = (await http.get(f"/v1/models/{path}")).json()
    assert (shown["id"], shown["root"]) == (path, "fake")
    assert (await http.get("/v1/models/none")).json()["error"]["code"] == "unknown_model"
    given = {"prompt": "ab", "max_tokens": 4, "seed": 1}
    by_run, by_name, by_path = [
        (await ask(http, "completions", model=name, **given))["choices"]
        for name in (run_id, "words", path)
    ]
    assert by_run == by_name == by_path
    await server.service.rename_run(run_id, "fake")  # which stays the base model
    assert "root" not in (await http.get("/v1/models/fake")).json()


async def test_tokens_of_texts_and_chats(http: httpx.AsyncClient) -> None:
    answer = await ask(http, "tokenize", prompt="ab")
    assert (answer["tokens"], answer["count"]) == ([97, 98], 2)
    chat = await ask(http, "tokenize", messages=CHAT)
    assert bytes(chat["tokens"]) == b"user: hi\nassistant: "
    await ask(http, "tokenize", status=400)


# --- refusals -------------------------------------------------------------------------------------

ABC = {"prompt": "a"}
SAY = {"messages": CHAT}
BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("completions", {}, 400, "prompt"),
    ("completions", {"model": "none", **ABC}, 404, "base_model"),
    ("completions", {"model": "", **ABC}, 400, "model"),
    ("completions", {"model": "x" * 2000, **ABC}, 400, "model"),
    ("completions", {"model": "weaver://a/b", **ABC}, 422, "path"),
    ("completions", {"model": "weaver://a/sampler/b", **ABC}, 404, "path"),
    ("completions", {"model": "../../etc", **ABC}, 404, "base_model"),
    ("completions", {"prompt": 3}, 400, None),
    ("completions", {"prompt": []}, 400, None),
    ("completions", {"prompt": ["a"] * 300}, 400, None),
    ("completions", {"prompt": [10**6]}, 422, "prompt"),
    ("completions", {"prompt": [-1]}, 422, None),
    ("completions", {"prompt": "a" * 5000}, 422, "prompt"),
    ("completions", {**ABC, "max_tokens": -1}, 422, "max_tokens"),
    ("completions", {**ABC, "max_tokens": 10**9}, 413, None),
    ("completions", {**ABC, "n": 0}, 400, "n"),
    ("completions", {**ABC, "n": 10**6}, 400, "n"),
    ("completions", {**ABC, "temperature": -1}, 422, "temperature"),
    ("completions", {**ABC, "temperature": "x"}, 400, "temperature"),
    ("completions", {**ABC, "top_p": 0}, 422, "top_p"),
    ("completions", {**ABC, "stop": ["a", ""]}, 422, "stop"),
    ("completions", {**ABC, "stop": 3}, 400, None),
    ("completions", {**ABC, "seed": -1}, 422, "seed"),
    ("completions", {**ABC, "best_of": 3}, 422, "best_of"),
    ("completions", {**ABC, "echo": True, "stream": True}, 422, "echo"),
    (
        "completions",
        {"prompt": ["a" * 1024] * 64, "echo": True, "logprobs": 16, "max_tokens": 0},
        413,
        "echo",
    ),
    ("completions", {**ABC, "max_tokens": 0}, 422, "max_tokens"),
    ("completions", {**ABC, "logprobs": 21}, 400, "logprobs"),
    ("completions", {**ABC, "logprobs": -1}, 400, "logprobs"),
    ("completions", {**ABC, "logprobs": 1, "top_logprobs": 1}, 400, "top_logprobs"),
    ("completions", {**ABC, "suffix": "x"}, 422, "suffix"),
    ("completions", {**ABC, "logit_bias": {"1": 101}}, 422, "logit_bias.0.1"),
    ("completions", {**ABC, "logit_bias": {"one": 1}}, 422, "logit_bias.0.0"),
    ("completions", {**ABC, "logit_bias": {"1": "x"}}, 400, None),
    ("completions", {**ABC, "logit_bias": [1]}, 400, "logit_bias"),
    ("completions", {**ABC, "logit_bias": {"257": 1}}, 422, "logit_bias"),
    ("completions", {**ABC, "logit_bias": {str(i): 1 for i in range(1025)}}, 422, "logit_bias"),
    ("completions", {"prompt": ["a", "b"], "stream": True}, 422, "prompt"),
    ("completions", {"prompt": "\ud800"}, 400, None),
    ("chat/completions", {}, 400, "messages"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": [3]}, 400, None),
    ("chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}, 400, None),
    ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, None),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        422,
        "messages[0]",
    ),
    ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, None),
    (
        "chat/completions",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "a", "arguments": "{"}}],
                }
            ]
        },
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    ("chat/completions", {**SAY, "tools": [{}]}, 400, None),
    ("chat/completions", {**SAY, "tools": 3}, 400, None),
    ("chat/completions", {**SAY, "tool_choice": "required"}, 400, "tool_choice"),
    ("chat/completions", {**SAY, "tools": [TOOL], "tool_choice": "required"}, 422, "json_schema"),
    ("chat/completions", {**SAY, "functions": [{}]}, 422, "functions"),
    ("chat/completions", {**SAY, "response_format": {"type": "x"}}, 400, None),
    ("chat/completions", {**SAY, "guided_json": {}}, 422, "json_schema"),
    ("chat/completions", {**SAY, "presence_penalty": 2.5}, 422, "presence_penalty"),
    ("chat/completions", {**SAY, "frequency_penalty": -2.5}, 422, "frequency_penalty"),
    ("chat/completions", {**SAY, "frequency_penalty": "x"}, 400, "frequency_penalty"),
    ("chat/completions", {**SAY, "top_logprobs": 3}, 400, "top_logprobs"),
    ("chat/completions", {**SAY, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ("chat/completions", {**SAY, "logprobs": True, "top_logprobs": -1}, 400, "top_logprobs"),
    ("chat/completions", {**SAY, "echo": True}, 400, "echo"),
    ("chat/completions", {**SAY, "stream_options": 3}, 400, "stream_options"),
    ("tokenize", {"prompt": "a", "messages": CHAT}, 400, "body"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]} {str(case[1])[:60]}")
async def test_bad_requests_are_refused_at_once(
    http: httpx.AsyncClient, case: tuple[str, dict[str, Any], int, str | None]
) -> None:
    path, body, status, param = case
    began = time.monotonic()
    content = json.dumps({"model": "fake", **body})
    reply = await http.post(f"/v1/{path}", content=content)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["message"] and error["type"] and error["code"]
    assert param is None or error["param"] == param
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 10_000, b'{"model": NaN}', b""])
async def test_what_is_no_request_is_refused(http: httpx.AsyncClient, content: bytes) -> None:
    for path in ("completions", "chat/completions", "tokenize"):
        reply = await http.post(f"/v1/{path}", content=content)
        assert reply.status_code in (400, 413), reply.text
        assert reply.json()["error"]["message"]


async def test_a_stream_of_a_refused_sample_says_why(http: httpx.AsyncClient) -> None:
    given = {"model": "fake", "prompt": "a", "stream": True, "max_tokens": 10**5}
    reply = await http.post("/v1/completions", json=given)
    told = [line for line in reply.text.splitlines() if line.startswith("data: ")]
    assert "max_tokens" in json.loads(told[-1].removeprefix("data: "))["error"]["message"]


async def test_a_key_opens_its_project_alone(tmp_path: Path) -> None:
    async with running(tmp_path, auth=True) as server, server.http() as http:
        refused = await http.post("/v1/chat/completions", json={})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        mine, theirs = (server.keys.create(project)[1] for project in ("mine", "theirs"))
        caller = CallerSession(
            server.service.seen_by(server.keys.authenticate(mine)), server.gateway
        )
        created = await caller.carry_out(CreateModel(base_model="fake"), Note())
        assert isinstance(created, ModelCreated)
        run_id = created.run.run_id
        saving = SaveCheckpoint(purpose="sampler", name="a")
        await caller.wait(await caller.submit(saving, Note(), run_id=run_id), 5)
        for key, status in ((theirs, 404), (mine, 200)):
            http.headers["Authorization"] = f"Bearer {key}"
            for name in (run_id, f"weaver://{run_id}/sampler/a"):
                await ask(http, "completions", model=name, prompt="a", status=status)
            listed = {model["id"] for model in (await http.get("/v1/models")).json()["data"]}
            assert (run_id in listed) == (status == 200)
