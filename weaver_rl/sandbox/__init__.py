"""`python_tool`: a tool with which a model runs Python, in a process that is shut in.

    python = rl.python_tool(cpu_s=5, memory_mb=512)
    reply = await rl.use_tools(agent, task["prompt"], tools=[python])

    rl.python_tool(container="python:3.12-slim")    # in a container of docker or podman

docs/security.md has what that holds, and what it does not.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import anyio

from weaver.errors import ConfigError, UnsupportedError
from weaver_rl.sandbox.containers import Limits, checked, run_contained, spoken
from weaver_rl.tools import ToolError

__all__ = ["python_tool"]

Part = Literal["files", "kernel", "network"]
HELD = {
    "files": "keep code from files",
    "kernel": "keep code from sockets and from other processes",
}
CHILD = [sys.executable, "-I", str(Path(__file__).with_name("child.py"))]
READ = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")
MIB = 2**20
TRY_S = 30.0


def python_tool(
    *,
    cpu_s: int = 5,
    wall_s: float = 10.0,
    memory_mb: int = 1024,
    file_mb: int = 16,
    output_bytes: int = 16_384,
    without: Collection[Part] = (),
    container: str | None = None,
    runtime: str | None = None,
) -> Callable[[str], Awaitable[str]]:
    """A tool `python(code)`, which answers what the code prints, errors included.

    Each call is a process of its own, in an empty folder of its own that is deleted afterwards,
    with this Python and its packages. It has no environment, no network, no other processes and no
    signals to any; it reads Python and its libraries, and writes in its folder alone. Linux only.

    With `container` each is a container of that image with the image's `python3`: no network, a
    root that is read-only, the user nobody without capabilities, one CPU and 64 processes.

    Args:
        cpu_s: seconds of CPU.
        wall_s: seconds, after which it is killed.
        memory_mb: MiB of addresses, those of the interpreter included; in a container of memory.
        file_mb: MiB of each file that it writes; in a container of all together, in its /work.
        output_bytes: after which it is killed, too.
        without: what need not hold: "files", "kernel" (sockets, processes), or "network" alone.
        container: an image that the runtime has, such as "python:3.12-slim"; none is pulled.
        runtime: "docker", "podman" or a path; by default the first of them that answers.

    Raises:
        ConfigError: a limit is not positive, or `without` names something else, or stands beside
            `container`; a runtime without a container.
        UnsupportedError: this system cannot hold it, or has no such runtime or image; says why.
    """
    numbers: dict[str, Any] = {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "memory_mb": memory_mb,
        "file_mb": file_mb,
        "output_bytes": output_bytes,
    }
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"is {value!r}.", field=name, hint="It must be above 0.")
    for part in without:
        if part not in (*HELD, "network"):
            raise ConfigError(
                f"names {part!r}.", field="without", hint=f"Known: {', '.join(HELD)}, network."
            )
    if container is None and runtime is not None:
        raise ConfigError(
            "is for containers.",
            field="runtime",
            hint='Name an image: container="python:3.12-slim"',
        )
    if container is not None:
        if without:
            raise ConfigError("is for processes, not for containers.", field="without")
        return _in_container(container, Limits(**numbers), runtime)
    _check_held(frozenset(without))
    limits = {
        "CPU": cpu_s,
        "AS": memory_mb * MIB,
        "FSIZE": file_mb * MIB,
        "NOFILE": 64,
        "CORE": 0,
    }

    async def python(code: str) -> str:
        """Runs a Python program, and answers what it prints. Nothing is kept between calls."""
        with tempfile.TemporaryDirectory(prefix="weaver-python-") as folder:
            orders = {**_orders(folder, without), "limits": limits, "code": code}
            env = _environment(folder)
            async with await anyio.open_process(
                CHILD, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True
            ) as process:
                try:
                    said = await spoken(process, json.dumps(orders), wall_s, output_bytes)
                finally:
                    if process.returncode is None:
                        process.kill()
                status = await process.wait()
        if status < 0:
            over = status == -signal.SIGXCPU
            what = f"used all of its {cpu_s} s of CPU" if over else f"ended by signal {-status}"
            raise ToolError(f"{what}\n{said}")
        return said

    return python


def _in_container(
    image: str, limits: Limits, runtime: str | None
) -> Callable[[str], Awaitable[str]]:
    by = checked(image, limits, runtime=runtime)

    async def python(code: str) -> str:
        """Runs a Python program, and answers what it prints. Nothing is kept between calls."""
        return await run_contained(by, image, limits, code)

    return python


def _environment(folder: str) -> dict[str, str]:
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **threads}


def _orders(folder: str, without: Collection[str]) -> dict[str, Any]:
    read: Sequence[str] = (*READ, sys.prefix, sys.base_prefix, str(Path(__file__).parent))
    return {"folder": folder, "without": sorted(without), "read": read, "limits": {}}


@cache
def _check_held(without: frozenset[str]) -> None:
    """Tries it once, with a process. Raises UnsupportedError."""
    hint = "Run the whole environment in a container, or a virtual machine"
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(f"is for Linux, this is {sys.platform}.", field="python", hint=hint)
    with tempfile.TemporaryDirectory(prefix="weaver-python-") as folder:
        orders = json.dumps(_orders(folder, without))
        done = subprocess.run(
            CHILD,
            input=orders,
            capture_output=True,
            text=True,
            env=_environment(folder),
            timeout=TRY_S,
            check=False,
        )
    failed = json.loads(done.stdout) if done.returncode == 0 else {"kernel": done.stderr}
    for part, why in failed.items():
        raise UnsupportedError(
            f"this system cannot {HELD[part]}: {why}.",
            field="python",
            hint=f'{hint}, or accept it: without=["{part}"].',
        )
