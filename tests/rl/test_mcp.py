"""Tools of an MCP server, a real one: called by a model, failing in words, missing by name."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import anyio
import pytest

import weaver_rl as rl
from tests.rl.scripted import TOOLS, ScriptedSampler, byte_tokenizer
from tests.rl.test_agent import agent_of
from weaver.errors import InvalidRequestError, ServiceConnectionError
from weaver_rl.tools import schema

pytest.importorskip("mcp", reason="needs the extra mcp")
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]
SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


async def used(tools: list[Any], *replies: str) -> list[str]:
    """What the model is told of its calls."""
    sampler = ScriptedSampler(byte_tokenizer(TOOLS), lambda turn, prompt: [*replies, "done"][turn])
    agent = agent_of(sampler)
    await rl.use_tools(agent, "go", tools=tools)
    assert '"Multiplies two numbers."' in sampler.tokenizer.decode(sampler.prompts[0])
    return [message["content"] for message in agent.messages if message["role"] == "tool"]


def add(a: int, b: int) -> int:
    return a + b


async def test_a_model_calls_them_beside_functions(anyio_backend: str) -> None:
    async with rl.mcp_tools(SERVER) as tools:
        assert [schema(tool)["function"]["name"] for tool in tools] == ["multiply", "refuse"]
        assert schema(tools[0])["function"]["parameters"]["required"] == ["a", "b"]
        assert '"multiply"' in rl.describe(tools)
        said = await used(
            [*tools, add],
            call("multiply", a=12, b=34),
            call("add", a=1, b=2),
            call("refuse", self="no"),
            call("multiply", a="x"),
        )
        assert said[:2] == ["408", "3"]
        assert said[2].startswith("error: ToolError: ")
        assert "valid integer" in said[3]
        results: list[str] = []

        async def one(n: int) -> None:
            results.append(await tools[0](a=n, b=n))

        async with anyio.create_task_group() as tasks:
            for n in range(8):
                tasks.start_soon(one, n)
        assert sorted(map(int, results)) == [n * n for n in range(8)]


async def listens(port: int) -> bool:
    try:
        await (await anyio.connect_tcp("127.0.0.1", port)).aclose()
    except OSError:
        return False
    return True


async def test_over_http(anyio_backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with await anyio.open_process([*SERVER, str(port)], stderr=DEVNULL) as process:
        with anyio.fail_after(60):
            for _ in range(600):
                if await listens(port):
                    break
                await anyio.sleep(0.1)
        async with rl.mcp_tools(f"http://127.0.0.1:{port}/mcp") as tools:
            assert await tools[0](a=6, b=7) == "42"
        process.kill()


@pytest.mark.parametrize(
    "server",
    ["http://127.0.0.1:9/mcp", ["/no/such/program"], [sys.executable, "-c", "pass"]],
    ids=["address", "program", "other"],
)
async def test_what_is_no_server_is_named(server: Any, anyio_backend: str) -> None:
    with pytest.raises(ServiceConnectionError, match="is not answering") as caught:
        async with rl.mcp_tools(server, timeout_s=10):
            pass
    assert caught.value.field == "server"


async def test_what_is_no_tool_and_the_error_of_a_block(anyio_backend: str) -> None:
    with pytest.raises(InvalidRequestError, match="There are multiply, refuse"):
        async with rl.mcp_tools(SERVER, only=["divide"]):
            pass
    with pytest.raises(KeyError, match="own"):
        async with rl.mcp_tools(SERVER, only=["multiply"]) as tools:
            assert len(tools) == 1
            raise KeyError("own")
