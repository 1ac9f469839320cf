"""Python for models, on this very kernel: what works, what each wall holds, and what it refuses."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import weaver_rl as rl
from tests.rl.scripted import TOOLS, ScriptedSampler, byte_tokenizer
from tests.rl.test_agent import agent_of
from weaver.errors import ConfigError, UnsupportedError
from weaver_rl import sandbox
from weaver_rl.tools import ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.anyio


def tool(**more: Any) -> Any:
    try:
        return rl.python_tool(**more)
    except UnsupportedError as error:
        pytest.skip(str(error))


async def test_it_runs_python_and_answers_what_that_prints(anyio_backend: str) -> None:
    python = tool()
    assert await python("print(6 * 7)") == "42\n"
    said = await python("import numpy as np\nprint(np.arange(4) @ np.ones(4))\n1 / 0")
    assert said.startswith("6.0\n") and said.endswith("ZeroDivisionError: division by zero\n")
    kept = "open('x', 'w').write('ok'); print(open('x').read(), len(__import__('os').listdir()))"
    assert [await python(kept) for _ in range(2)] == ["ok 1\n"] * 2
    threads = "import threading as t; x = t.Thread(target=print, args=(3,)); x.start(); x.join()"
    assert await python(threads) == "3\n"
    assert await python("import asyncio; print(asyncio.run(asyncio.sleep(0, 5)))") == "5\n"
    assert await python("import sys; print(repr(sys.stdin.read()))") == "''\n"


WALLS = {
    "environment": ("import os; print(sorted(os.environ))", "'HOME', 'LANG'"),
    "read": (f"print(open({str(Path(__file__))!r}).read())", "Permission denied"),
    "list": (f"import os; print(os.listdir({str(Path.home())!r}))", "Permission denied"),
    "write": (f"open({str(Path(__file__).with_name('evil'))!r}, 'w')", "Permission denied"),
    "delete": (f"import os; os.remove({str(Path(__file__))!r})", "Permission denied"),
    "mode": (f"import os; os.chmod({str(Path(__file__))!r}, 0)", "not permitted"),
    "times": (f"import os; os.utime({str(Path(__file__))!r}, (0, 0))", "not permitted"),
    "library": ("import os; open(os.__file__, 'a')", "Permission denied"),
    "process": ("import subprocess; subprocess.run(['ls'])", "not permitted"),
    "fork": ("import os; os.fork()", "not permitted"),
    "exec": ("import os, sys; os.execv(sys.executable, ['python'])", "rror"),
    "signal": (f"import os; os.kill({os.getpid()}, 9)", "not permitted"),
    "signals": ("import os; os.kill(-1, 9)", "not permitted"),
    "owner": (f"import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {os.getpid()})", "not permitted"),
    "owner_ioctl": ("import fcntl; fcntl.ioctl(0, 0x8901, b'1234')", "not permitted"),
    "udp": ("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "not permitted"),
    "limits": ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", "not allowed"),
    "others": (f"import resource as r; r.prlimit({os.getpid()}, r.RLIMIT_CPU, (1, 1))", "rror"),
    "file": ("open('x', 'w').write('a' * 3_000_000)", "File too large"),
    "memory": ("x = 'a' * 2_000_000_000", "MemoryError"),
    "proc": ("print(open('/proc/self/environ').read())", "Permission denied"),
    "mount": ("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))", "-1"),
}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("wall", WALLS)
async def test_a_wall_holds(wall: str, anyio_backend: str) -> None:
    code, says = WALLS[wall]
    said = await tool(file_mb=1)(code)
    assert says in said
    assert len([line for line in said.splitlines() if line]) >= 1
    assert not Path(__file__).with_name("evil").exists()


async def test_no_network(anyio_backend: str) -> None:
    """A listener beside it, which the same code reaches where the network is allowed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port})); print('through')"
        assert "not permitted" in await tool()(code)
        # Landlock keeps TCP out, too, where it can; so files are let go as well
        assert await tool(without={"network", "files"})(code) == "through\n"


@pytest.mark.parametrize(
    ("code", "more", "says"),
    [
        ("while True: pass", {"cpu_s": 1, "wall_s": 60}, "used all of its 1 s of CPU"),
        ("import time; print('so far', flush=True); time.sleep(60)", {"wall_s": 3}, "longer than"),
        ("print('x' * 100_000)", {"output_bytes": 1000}, "said more than 1000 bytes"),
        ("import os; os.kill(os.getpid(), 15)", {}, "ended by signal 15"),
    ],
    ids=["cpu", "wall", "output", "signal"],
)
async def test_what_ends_it(code: str, more: Any, says: str, anyio_backend: str) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        await tool(**more)(code)
    if "wall_s" in more and "so far" in code:
        assert "so far" in str(caught.value)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_does_not_wait_leaves_nothing_behind(anyio_backend: str) -> None:
    python, mark = tool(), "import time; time.sleep(54.321)"
    with anyio.move_on_after(1):
        await python(mark)
    assert not [one for one in children() if b"sandbox" in one]


OWNER = """
import anyio, sys, weaver_rl as rl
python = rl.python_tool(**eval(sys.argv[1]))
print("made", flush=True)
anyio.run(python, "import time; time.sleep(600)", backend=sys.argv[2])
"""


@contextmanager
def owner(more: dict[str, Any], backend: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, in a call of the tool that sleeps."""
    command = [sys.executable, "-c", OWNER, str(more), backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"made\n"  # what tried the walls is gone
            yield process
        finally:
            process.kill()


def until(told: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not told():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_owner_that_is_killed_takes_it_along(backend: str) -> None:
    tool()
    with owner({"wall_s": 600}, backend) as killed:
        until(lambda: any(map(is_shut_in, children_of(killed.pid))))
        [mine] = filter(is_shut_in, children_of(killed.pid))
        killed.kill()
        until(lambda: not is_shut_in(mine))


def is_shut_in(pid: str) -> bool:
    """It runs the code: its filter is there, and it has not ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "Seccomp:\t2" in status and "State:\tZ" not in status


def children_of(pid: int) -> list[str]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for file in threads for child in file.read_text().split()]


def children() -> list[bytes]:
    """The commands of this process's children."""
    return [Path(f"/proc/{child}/cmdline").read_bytes() for child in children_of(os.getpid())]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_model_uses_it(anyio_backend: str) -> None:
    python = tool()
    calls = [
        '<tool_call>{"name": "python", "arguments": {"code": "print(2 ** 10)"}}</tool_call>',
        "It is 1024.",
    ]
    sampler = ScriptedSampler(byte_tokenizer(TOOLS), lambda turn, prompt: calls[turn])
    agent = agent_of(sampler)
    reply = await rl.use_tools(agent, "What is 2 ** 10?", tools=[python])
    assert reply.text == "It is 1024."
    assert [m["content"] for m in agent.messages if m["role"] == "tool"] == ["1024\n"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_cannot_be_held_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    for more in ({"cpu_s": 0}, {"wall_s": float("nan")}, {"without": ["memory"]}):
        with pytest.raises(ConfigError, match=next(iter(more))):
            rl.python_tool(**more)  # type: ignore[arg-type]
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs Linux on x86_64 or aarch64")
    sandbox._check_held.cache_clear()
    code = (
        "import ctypes, sys\n"
        "class Old:\n"
        "    def __getattr__(self, name): return lambda *given: -1\n"
        "ctypes.CDLL = lambda *given, **more: Old()\n"
        "ctypes.get_errno = lambda: 38\n"
        "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    monkeypatch.setattr(sandbox, "CHILD", [sys.executable, "-c", code, sandbox.CHILD[-1]])
    with pytest.raises(UnsupportedError, match="keep code from files: Landlock: Function not"):
        rl.python_tool()
    with pytest.raises(UnsupportedError, match="keep code from sockets and from other processes"):
        rl.python_tool(without={"files"})
    sandbox._check_held.cache_clear()
