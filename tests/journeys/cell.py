"""A block of a page, run as a cell of a notebook is: with `await` outside of functions.

`python -m tests.journeys.cell FILE` runs one in a process of its own, tests/test_docs.py a page.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import anyio


def run(source: str, name: str, namespace: dict[str, object]) -> None:
    """Executes the source, whose tracebacks call it `name`, in a namespace that keeps its names."""
    code = compile(source, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if not code.co_flags & inspect.CO_COROUTINE:
        exec(code, namespace)
        return

    async def body() -> None:
        await eval(code, namespace)

    anyio.run(body)


if __name__ == "__main__":
    run(Path(sys.argv[1]).read_text(), sys.argv[1], {"__name__": "__main__"})
