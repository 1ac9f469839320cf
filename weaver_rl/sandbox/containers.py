"""Containers of docker or podman, in which `python_tool` runs code where an image is named.

Each call is a container of its own: `RUNTIME run --rm`, with what is refused and limited as flags,
and the code on its standard input, which stays open until the call is over. docs/security.md has
what that holds, and what it does not.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anyio
from anyio.abc import Process

from weaver.errors import UnsupportedError
from weaver_rl.tools import ToolError

__all__: list[str] = []

RUNTIMES = ("docker", "podman")
START_S = 60.0
"""For a runtime to answer, and for a container to start or to be removed."""
NOBODY, PROCESSES = 65534, 64
KILLED = 137
"""What a runtime says of a container that was killed, by the kernel for its limits too."""
STUB = """
import json, os, sys, threading
os.dup2(1, 2)
print(sys.argv.pop())
code = json.loads(sys.stdin.readline() or sys.exit())
child = os.fork()
if child:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
"""
"""What the image's Python runs: one stream, whose first line says that the container has begun.

Its first process ends, and the container with it, when the code has, or when standard input is
closed: however the run ends, the kernel closes that.
"""
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "ftp", "all", "no")]
"""Of the host, which runtimes hand on, with the passwords in them."""


@dataclass(frozen=True, slots=True)
class Limits:
    cpu_s: int
    wall_s: float
    memory_mb: int
    file_mb: int
    output_bytes: int


def checked(image: str, limits: Limits, *, runtime: str | None) -> str:
    """The runtime, by which a container of this image has begun and ended once.

    Raises:
        UnsupportedError: no runtime is here or answers, the image is not here, or it has no
            Python; says which, in a line.
    """
    found = [runtime] if runtime else [name for name in RUNTIMES if shutil.which(name)]
    refused = []
    for name in found:
        refusal = _refusal(["info"], name)
        if not refusal:
            _try(name, image, limits)
            return os.path.abspath(shutil.which(name) or name)  # it is run elsewhere
        refused.append(f"{name} does not answer ({refusal})")
    raise UnsupportedError(
        f"{'; '.join(refused) or 'neither docker nor podman is on PATH'}.",
        field="container",
        hint="Install or start one, or leave `container` away: a process holds code on Linux.",
    )


@cache
def _try(runtime: str, image: str, limits: Limits) -> None:
    if refusal := _refusal(["image", "inspect", image], runtime):
        raise UnsupportedError(
            f"{runtime} has no image {image!r} ({refusal}).",
            field="container",
            hint=f"Nothing is pulled unasked: {runtime} pull {image}",
        )
    name, mark = _invented()
    if refusal := _refusal(_run(runtime, image, limits, name, mark), runtime):
        _refusal(_removed(runtime, name), runtime)
        raise UnsupportedError(
            f"a container of {image!r} did not begin by {runtime} ({refusal}).",
            field="container",
            hint="It needs `python3`, and a runtime that can limit memory, CPUs and processes.",
        )


def _refusal(command: Sequence[str], runtime: str) -> str:
    """The last line that a command said, if it failed."""
    try:
        done = subprocess.run(
            [runtime, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return _last_line(done.stderr or done.stdout) if done.returncode else ""


def _last_line(said: str) -> str:
    return said.strip().rpartition("\n")[2].strip().rstrip(".") or "it said nothing"


def _invented() -> tuple[str, str]:
    """A container's name, and what no program can say before it has begun."""
    return f"weaver-python-{secrets.token_hex(8)}", secrets.token_hex(16)


def _is_podman(runtime: str) -> bool:
    return Path(runtime).name.startswith("podman")


def _run(runtime: str, image: str, limits: Limits, name: str, mark: str) -> list[str]:
    memory, size = f"{limits.memory_mb}m", limits.file_mb
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = 4096 if most == resource.RLIM_INFINITY else min(4096, most)  # of all containers
    held = [
        "--network=none", "--ipc=none", "--read-only", "--cap-drop=ALL",
        "--security-opt=no-new-privileges", f"--user={NOBODY}:{NOBODY}",
        f"--pids-limit={PROCESSES}", "--cpus=1", f"--memory={memory}", f"--memory-swap={memory}",
        f"--ulimit=cpu={limits.cpu_s}:{limits.cpu_s}", f"--ulimit=fsize={size * 2**20}",
        "--ulimit=nofile=64:64", f"--ulimit=nproc={processes}:{processes}", "--ulimit=core=0:0",
        f"--tmpfs=/work:rw,nosuid,nodev,noexec,mode=1777,size={size}m", "--workdir=/work",
    ]  # fmt: skip
    if _is_podman(runtime):  # its read-only containers have folders to write in; docker's have none
        held.append("--read-only-tmpfs=false")
    none = [f"--env={one}=" for proxy in PROXIES for one in (proxy, proxy.upper())]
    return [
        *("run", "--rm", "--interactive", "--pull=never", "--log-driver=none", "--no-healthcheck"),
        *(f"--name={name}", "--label=weaver=python", "--env=HOME=/work", *none, *held),
        *("--entrypoint=python3", image, "-I", "-B", "-u", "-c", STUB, mark),
    ]


def _removed(runtime: str, name: str) -> list[str]:
    return ["rm", "--force", *(["--time=0"] if _is_podman(runtime) else []), name]


async def run_contained(runtime: str, image: str, limits: Limits, code: str) -> str:
    """What a program prints, in a container of its own that is gone afterwards, cancelled too.

    Raises:
        ToolError: it took too long, said too much or was killed.
        UnsupportedError: the container did not begin.
    """
    name, mark = _invented()
    command = [runtime, *_run(runtime, image, limits, name, mark)]
    ended = False
    with tempfile.TemporaryDirectory(
        prefix="weaver-python-"
    ) as folder:  # podman writes where it is
        started = anyio.open_process(command, stderr=subprocess.STDOUT, cwd=folder)
        async with await started as process:
            try:
                first = await _begun(process, f"{mark}\n".encode())
                said = await spoken(
                    process, json.dumps(code), limits.wall_s, limits.output_bytes, said=first
                )
                status, ended = await process.wait(), True
            finally:
                if not ended:
                    await _stop(process, [runtime, *_removed(runtime, name)])
    if status == KILLED:
        most = f"its {limits.cpu_s} s of CPU, or its {limits.memory_mb} MiB of memory"
        raise ToolError(f"was killed: it used all of {most}\n{said}")
    return said


async def _stop(process: Process, removal: Sequence[str]) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(START_S):
        with suppress(ProcessLookupError):
            process.kill()  # first, so that it begins nothing after the removal
        await anyio.run_process(removal, check=False)


async def _begun(process: Process, mark: bytes) -> bytes:
    """What it has said behind the mark."""
    assert process.stdout is not None
    said = b""
    with anyio.move_on_after(START_S):
        async for piece in process.stdout:
            said += piece
            _, found, rest = said.partition(mark)
            if found:
                return rest
    raise UnsupportedError(
        f"the container did not begin ({_last_line(said.decode(errors='replace'))}).",
        field="container",
        hint="It did when the tool was made: look at the runtime, and at its disk.",
    )


async def spoken(
    process: Process, orders: str, wall_s: float, most: int, *, said: bytes = b""
) -> str:
    """What a process says to its orders, a line, behind what it has `said`.

    Its standard input stays open: where this process is killed, it is closed, and that one ends.

    Raises:
        ToolError: it took too long, or said too much.
    """
    assert process.stdin is not None and process.stdout is not None
    with anyio.move_on_after(wall_s) as deadline:
        try:
            await process.stdin.send(orders.encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # it ended before; its output says why
        while len(said) <= most:
            try:
                said += await process.stdout.receive()
            except anyio.EndOfStream:
                # it is waited for, since asyncio loses the status of one that is killed as it ends
                await process.wait()
                break
    shown = said[:most].decode(errors="replace")
    if deadline.cancelled_caught:
        raise ToolError(f"took longer than {wall_s:g} s\n{shown}")
    if len(said) > most:
        raise ToolError(f"said more than {most} bytes\n{shown}")
    return shown
