"""`mcp_tools`: the tools of an MCP server, beside functions wherever environments name tools.

    async with rl.mcp_tools([sys.executable, "server.py"]) as tools:
        reply = await rl.use_tools(agent, task["prompt"], tools=[*tools, multiply])

By the official `mcp` package, which the extra `mcp` installs; it is imported when it is used.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from weaver.errors import InvalidRequestError, ServiceConnectionError, requiring
from weaver_rl.guard import innermost
from weaver_rl.tools import ToolError

__all__ = ["mcp_tools"]

PAGES = 100
"""Of a server's list of tools; one that never ends is refused."""


@dataclass(frozen=True, slots=True, eq=False)
class ServedTool:
    """A tool whose schema is the server's: `ServedTool({"type": "function", ...}, call)`."""

    json_schema: Mapping[str, Any]
    """In the form that chat templates take."""
    call: Callable[[Mapping[str, Any]], Awaitable[str]]

    @property
    def __name__(self) -> str:
        return str(self.json_schema["function"]["name"])

    async def __call__(self, /, **arguments: Any) -> str:
        return await self.call(arguments)


@asynccontextmanager
async def mcp_tools(
    server: str | Sequence[str],
    *,
    only: Collection[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
) -> AsyncIterator[list[ServedTool]]:
    """Connects to a server, or starts one, until the block ends; its tools may be called at once.

    Args:
        server: the address of one, `http://127.0.0.1:9000/mcp`, or the command of a program that
            speaks over its standard input and output, `["python", "server.py"]`.
        only: names of the tools that a model may call; None: all.
        env: variables of the program beside PATH, HOME and the like; it has no others.
        timeout_s: of each answer of the server.

    Raises:
        InvalidRequestError: `only` names a tool that the server does not have.
        MissingDependencyError: the extra `mcp` is not installed.
        ServiceConnectionError: there is no such server, or it does not answer.
    """
    with requiring("tools of an MCP server", "mcp"):
        from mcp import Client, MCPError, StdioServerParameters
    shown = server if isinstance(server, str) else " ".join(server)
    target: Any = server
    if not isinstance(server, str):
        command, *arguments = server
        given = None if env is None else dict(env)
        target = StdioServerParameters(command=command, args=arguments, env=given)
    opened = False
    try:
        async with Client(target, read_timeout_seconds=timeout_s) as client:
            tools = _chosen(await _listed(client), only, shown)
            opened = True
            yield [ServedTool(_schema(tool), partial(_call, client, tool.name)) for tool in tools]
    except (ExceptionGroup, MCPError, OSError) as group:
        error = innermost(group)
        if opened or isinstance(error, InvalidRequestError):
            raise error from error.__cause__
        hint = "Name the address of an MCP server, or the command that starts one."
        message = f"{shown} is not answering: {error or type(error).__name__}."
        raise ServiceConnectionError(message, field="server", hint=hint) from error


async def _listed(client: Any) -> list[Any]:
    found: list[Any] = []
    page = await client.list_tools()
    for _ in range(PAGES):
        found += page.tools
        if page.next_cursor is None:
            return found
        page = await client.list_tools(cursor=page.next_cursor)
    raise ServiceConnectionError(f"the server's list of tools has over {PAGES} pages.")


def _chosen(tools: Sequence[Any], only: Collection[str] | None, server: str) -> list[Any]:
    names = [tool.name for tool in tools]
    for name in only or ():
        if name not in names:
            there = ", ".join(names) or "none"
            message = f"names {name!r}, which {server} does not have."
            raise InvalidRequestError(message, field="only", hint=f"There are {there}.")
    return [tool for tool in tools if only is None or tool.name in only]


def _schema(tool: Any) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


async def _call(client: Any, name: str, arguments: Mapping[str, Any]) -> str:
    """Raises ToolError: it failed, with the server's words."""
    result = await client.call_tool(name, dict(arguments))
    said = "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)
    if result.is_error:
        raise ToolError(said)
    if not said and result.structured_content is not None:
        return json.dumps(result.structured_content)
    return said
