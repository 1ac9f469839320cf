"""Python for models in containers: real ones, of an image made from this very Python, where docker
or podman works; and what is refused by name where they, a daemon or an image are missing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import weaver_rl as rl
from tests.rl.scripted import TOOLS, ScriptedSampler, byte_tokenizer
from tests.rl.test_agent import agent_of
from tests.rl.test_sandbox import owner, until
from weaver.errors import ConfigError, UnsupportedError
from weaver_rl.sandbox import containers
from weaver_rl.tools import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
IMAGE = "weaver-python-test:1"
NOT_NEEDED = {"site-packages", "test", "idlelib", "tkinter", "lib2to3", "ensurepip", "__pycache__"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def image_tar(to: Path) -> None:
    """A root with this Python, its standard library and what they are linked with."""
    python = os.path.realpath(sys.executable)
    linked = subprocess.run(["ldd", python], capture_output=True, text=True, check=True).stdout
    stdlib = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix}))

    def needed(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(info.name).name
        return None if name in NOT_NEEDED or name.startswith("config-") else info

    with tarfile.open(to, "w", dereference=True) as tar:
        tar.add(python, "usr/local/bin/python3")
        tar.add(stdlib, f"usr/local/lib/{stdlib.name}", filter=needed)
        for name, path in re.findall(r"(?:(\S+) => )?(/\S+) \(0x", linked):
            tar.add(path, f"usr/lib/{name}" if name else path[1:])
        users = b"root:x:0:0::/:\nnobody:x:65534:65534::/:\n"
        passwd = tarfile.TarInfo("etc/passwd")
        passwd.size = len(users)
        tar.addfile(passwd, BytesIO(users))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that works and has the image; podman with a store of its own."""
    place = tmp_path_factory.mktemp("containers")
    conf = place / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{place}/store"\nrunroot = "{place}/run"\n'
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CONTAINERS_STORAGE_CONF", str(conf))
        reasons = []
        for name in filter(shutil.which, containers.RUNTIMES):
            if refusal := containers._refusal(["info"], name):
                reasons.append(f"{name}: {refusal}")
                continue
            image_tar(place / "root.tar")
            done = subprocess.run([name, "import", place / "root.tar", IMAGE], capture_output=True)
            assert done.returncode == 0, done.stderr
            try:
                rl.python_tool(container=IMAGE, runtime=name)
            except UnsupportedError as error:
                reasons.append(str(error))
            else:
                yield name
                assert listed(name) == ""
                return
            finally:
                subprocess.run([name, "rmi", "--force", IMAGE], capture_output=True, check=True)
    pytest.skip("no container can be run: " + ("; ".join(reasons) or "no docker, no podman"))


def listed(runtime: str, *more: str) -> str:
    """Containers of the tool that are there, running or not."""
    command = [runtime, "ps", "--all", "--quiet", "--filter", "label=weaver=python", *more]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
async def test_it_runs_python_and_answers_what_that_prints(runtime: str) -> None:
    python = rl.python_tool(container=IMAGE, runtime=runtime)
    code = (
        "import os, sys\nopen('x', 'w').write('ok')\nprint(os.getcwd(), os.listdir(), os.getuid())"
    )
    code += "\nprint(repr(sys.stdin.read()), sys.argv)\n1 / 0"
    said = [await python(code) for _ in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("/work ['x'] 65534\n'' ['-c']\n")
    assert said[0].endswith("ZeroDivisionError: division by zero\n")


WALLS = """
import os, socket, resource
def tried(what):
    try:
        return what()
    except BaseException as error:
        return type(error).__name__ + ": " + str(error)
print("user", os.getuid(), os.getgid(), os.getgroups())
print("capabilities", [x.split()[1] for x in open("/proc/self/status") if x.startswith("CapEff")])
print("root", tried(lambda: open("/usr/evil", "w")))
print("places", [x for x in ("/", "/tmp", "/run", "/var/tmp", "/dev", "/dev/shm", "/etc", "/usr")
                 if os.access(x, os.W_OK)])
print("network", [name for _, name in socket.if_nameindex()])
print("out", tried(lambda: socket.create_connection(("192.0.2.1", 9), timeout=2)))
print("host", tried(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=2)))
print("files", os.path.exists(FILE))
print("secrets", [x for x in os.environ.values() if "secret" in x])
def write():
    with open("x", "wb") as file:
        for _ in range(9): file.write(bytes(2**20)); file.flush()
print("file", tried(write))
os.remove("x")
def several():
    for i in range(9):
        with open(str(i), "wb") as file: file.write(bytes(2**19 * 3))
print("folder", tried(several))
print("handles", tried(lambda: [open("/dev/null") for _ in range(99)]))
def forked():
    for count in range(999):
        if os.fork() == 0:
            os.execv("/usr/local/bin/python3", ["python3", "-c", "import time; time.sleep(99)"])
print("processes", tried(forked))
"""


@pytest.mark.slow
async def test_the_walls_hold(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy:3128")
    monkeypatch.setenv("MY_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = WALLS.replace("PORT", str(listener.getsockname()[1])).replace("FILE", repr(__file__))
        python = rl.python_tool(container=IMAGE, runtime=runtime, file_mb=4, wall_s=60)
        said = dict(line.split(" ", 1) for line in (await python(code)).splitlines())
    assert said.pop("user").startswith("65534 65534 ")
    assert said.pop("root").startswith("OSError: [Errno 30] Read-only file system")
    assert said.pop("network") in ("['lo']", "[]")
    assert "unreachable" in said.pop("out") and "refused" in said.pop("host")
    assert "File too large" in said["file"] or "No space left" in said["file"]
    assert "No space left" in said["folder"] and "Too many open files" in said["handles"]
    assert "temporarily unavailable" in said["processes"]
    rest = {name: said[name] for name in ("capabilities", "places", "files", "secrets")}
    none = "['0000000000000000']"
    assert rest == {"capabilities": none, "places": "[]", "files": "False", "secrets": "[]"}


ENDS = {
    "while True: pass": "used all of its 1 s of CPU",
    "x = bytearray(10**9)\nprint(len(x))": "or its 64 MiB of memory",
    "print('x' * 100_000)": "said more than 1000 bytes",
    "import time; print('so far'); time.sleep(60)": "took longer than 12 s\nso far",
}


@pytest.mark.slow
async def test_what_ends_it_leaves_nothing_behind(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, with one who does not wait; podman notes in its folder what memory killed."""
    monkeypatch.chdir(tmp_path)
    python = rl.python_tool(
        container=IMAGE, runtime=runtime, cpu_s=1, memory_mb=64, output_bytes=1000, wall_s=12
    )
    said: dict[str, str] = {}

    async def ended(code: str) -> None:
        with pytest.raises(ToolError) as caught:
            await python(code)
        said[code] = str(caught.value)

    async def left() -> None:
        with anyio.move_on_after(5) as waited:
            await python("import time; time.sleep(61)")
        assert waited.cancelled_caught

    async with anyio.create_task_group() as tasks:
        for code in ENDS:
            tasks.start_soon(ended, code)
        tasks.start_soon(left)
    assert all(says in said[code] for code, says in ENDS.items()), said
    assert all(len(text) < 1200 for text in said.values())
    assert listed(runtime) == "" and not os.listdir(tmp_path)


@pytest.mark.slow
def test_an_owner_that_is_killed_takes_it_along(runtime: str) -> None:
    with owner({"container": IMAGE, "runtime": runtime, "wall_s": 600}, "asyncio") as killed:
        until(lambda: listed(runtime, "--filter=status=running"))
        killed.kill()
        until(lambda: not listed(runtime))


@pytest.mark.slow
async def test_a_model_uses_it(runtime: str) -> None:
    python = rl.python_tool(container=IMAGE, runtime=runtime)
    calls = [
        '<tool_call>{"name": "python", "arguments": {"code": "print(2 ** 10)"}}</tool_call>',
        "It is 1024.",
    ]
    agent = agent_of(ScriptedSampler(byte_tokenizer(TOOLS), lambda turn, prompt: calls[turn]))
    reply = await rl.use_tools(agent, "What is 2 ** 10?", tools=[python])
    assert reply.text == "It is 1024."
    assert [m["content"] for m in agent.messages if m["role"] == "tool"] == ["1024\n"]


@pytest.mark.slow
async def test_an_image_that_is_not_there_is_not_pulled(runtime: str) -> None:
    for image, says in (("weaver-no-such:1", "nothing is pulled unasked"), (IMAGE, "begin")):
        more = {"memory_mb": 1} if image == IMAGE else {}  # no runtime has containers so small
        with pytest.raises(UnsupportedError, match=f"(?i){says}") as caught:
            rl.python_tool(container=image, runtime=runtime, **more)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value) and runtime in str(caught.value)
    assert listed(runtime) == ""


@pytest.mark.slow
async def test_one_that_is_gone_later_is_no_reply_of_the_tool(runtime: str) -> None:
    limits = containers.Limits(cpu_s=1, wall_s=1, memory_mb=64, file_mb=1, output_bytes=99)
    with pytest.raises(UnsupportedError, match="the container did not begin"):
        await containers.run_contained(runtime, "weaver-no-such:1", limits, "print(1)")


def test_what_is_missing_is_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = time.monotonic()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="neither docker nor podman is on PATH"):
        rl.python_tool(container="python:3.12-slim")
    with pytest.raises(UnsupportedError, match=r"nerdctl does not answer .*No such file"):
        rl.python_tool(container="python:3.12-slim", runtime="nerdctl")
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon.' >&2\nexit 1\n")
    docker.chmod(0o755)
    with pytest.raises(UnsupportedError, match=r"docker does not answer .Cannot connect to") as no:
        rl.python_tool(container="python:3.12-slim")
    assert "\n" not in str(no.value)
    for more, field in (
        ({"container": "x", "without": ["files"]}, "without"),
        ({"runtime": "docker"}, "runtime"),
        ({"container": "x", "cpu_s": 0}, "cpu_s"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}"):
            rl.python_tool(**more)
    assert time.monotonic() - begin < 10
