"""Does a job of docs/jobs.md in a folder: writes its files, runs its Python and types its lines.

What stands for something on the page is put in: the server's address, its key, the newest run.
Each block of Python and each line of the shell is a process of its own, as a reader's would be.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.clients.server import serving

if TYPE_CHECKING:
    from tests.journeys.page import Block, Job


ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINKER, VLLM = ROOT / ".venv-tinker/bin", ROOT / ".venv-vllm/bin"
SERVERS = {
    "weaver serve": "Weaver at ",
    "weaver up": "TINKER_API_KEY",
    "vllm serve": "startup complete",
}
"""Lines that go on until their terminal is closed, and what they say when they listen."""
NOT_RUN = {
    r"^pip install": "tests/test_packages.py installs",
    r"--install-completion": "changes the reader's own shell, whichever that is",
    r"checkpoints eval": "its data sets are on a hub",
    r"Qwen/|\bBASE\b": "its weights are on a hub",
    r"^make ": "makes an environment; the suite is what it runs",
    r"python -m recipes\.": "takes a minute; tests/recipes runs each with fewer steps",
    r"tinker_cookbook": "`make test-cookbook` runs it",
    r"install-sampler|--sampler vllm": "`make test-cluster` does it",
    r"--cluster|--ray|weaver cluster": "tests/engine/cluster starts Ray",
    r"docker |sbatch |deploy/|/readyz": "tests/test_deployment.py reads what it names",
}
"""Lines that no player runs, by a part of them, with the reason."""
DEADLINE_S = 300.0
"""Of a line."""


class Player:
    """Where a job is done: a folder, with the environment of its terminals.

    Attributes:
        skipped: lines that could not be run here, with the reason.
    """

    def __init__(self, folder: Path, server: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.skipped: dict[str, str] = {}
        self._told = {}  # what placeholders stand for
        links = folder / ".path"  # as it is installed, the package of recipes has this name
        links.mkdir(parents=True, exist_ok=True)
        if not (links / "weaver_recipes").exists():
            (links / "weaver_recipes").symlink_to(ROOT / "recipes")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WEAVER_", "TINKER_"))}
        self._env = kept | {
            "HF_HUB_OFFLINE": "1",
            "HOME": str(folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{links}{os.pathsep}{ROOT}",
            "WEAVER_HOME": str(folder / "home"),
            "WEAVER_PORT": str(_free_port()),
        }
        if server is not None:
            self._env |= {k: v for k, v in server.items() if k.startswith("WEAVER_")}
            self._told = {"address": server["WEAVER_BASE_URL"], "key": server["WEAVER_API_KEY"]}
        self._running: list[subprocess.Popen[bytes]] = []

    def play(self, job: Job) -> float:
        """Does the job; answers the seconds that it took."""
        began = time.monotonic()
        try:
            for block in job.blocks:
                self._play(block)
        finally:
            for process in self._running:
                _stop(process)
            self._running.clear()
        return time.monotonic() - began

    def _play(self, block: Block) -> None:
        if block.file is not None:
            (self.folder / block.file).write_text(block.text)
        elif block.language == "python":
            cell = self.folder / ".cell.py"
            cell.write_text(block.text)
            self._run(f"{sys.executable} -m tests.journeys.cell {cell}")
        elif block.language == "bash":
            for line in block.text.splitlines():
                self._type(re.sub(r"\s+#.*", "", line))

    def _type(self, line: str) -> None:
        """A line of the shell, or a note why not."""
        if reason := self._missing(line):
            self.skipped[line] = reason
            return
        typed = self._filled(line)
        if line.startswith("export "):
            self._env |= dict(one.split("=", 1) for one in shlex.split(typed)[1:])
        elif listens := next((said for one, said in SERVERS.items() if line.startswith(one)), None):
            self._start(typed, listens)
        else:
            said = self._run(typed)
            if key := re.search(r"\bwv-\S+", said):
                self._told["key"] = key[0]

    def _missing(self, line: str) -> str | None:
        """Why a line cannot be run here."""
        if reason := not_run(line):
            return reason
        if line.startswith("vllm") and not VLLM.exists():
            return "`make test-vllm` installs vLLM"
        if self._of_tinker(line) and not TINKER.exists():
            return "`make test-clients` installs the package tinker"
        if ("your_program.py" in line or "TINKER" in line) and "address" not in self._told:
            return "needs a server"
        return None

    def _filled(self, line: str) -> str:
        """The line, with what its placeholders stand for."""
        if named := re.search(r"weaver://RUN(\S+)", line):
            listed = json.loads(self._run("weaver checkpoints list -o json"))
            paths = [one["path"] for one in listed if one["path"].endswith(named[1])]
            line = line.replace(named[0], paths[-1])
        elif "RUN" in line:
            runs = json.loads(self._run("weaver runs list -o json"))
            line = line.replace("RUN", runs[-1]["run_id"])
        line = line.replace("http://127.0.0.1:8000", self._told.get("address", ""))
        return line.replace("wv-...", self._told.get("key", ""))

    def _of_tinker(self, line: str) -> bool:
        """Whether it runs a program for that package, which has an environment of its own."""
        program = self.folder / "your_program.py"
        return program.name in line and program.exists() and "import tinker" in program.read_text()

    def _run(self, line: str) -> str:
        """What it prints; it must not fail."""
        others = TINKER if self._of_tinker(line) else None
        env = self._env | ({"PATH": f"{others}:{self._env['PATH']}"} if others else {})
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def _start(self, line: str, listens: str) -> None:
        """In a terminal of its own, until it listens; one server of ours at a time."""
        if line.startswith("weaver"):
            for process in [one for one in self._running if "weaver" in str(one.args)]:
                _stop(process)
                self._running.remove(process)
        log = self.folder / f"server-{len(self._running)}.log"
        env = self._env | {"PATH": f"{VLLM}:{self._env['PATH']}"}
        with log.open("w") as out:
            process = subprocess.Popen(
                shlex.split(line), cwd=self.folder, env=env, stdout=out, stderr=out
            )
        self._running.append(process)
        deadline = time.monotonic() + DEADLINE_S
        while listens not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        for name, said in (("address", r"Weaver at ([^\s;]+)"), ("key", r"\b(wv-[\w-]{8,})")):
            if found := re.search(said, log.read_text()):
                self._told[name] = found[1]


def not_run(line: str) -> str | None:
    """Why nobody runs it, if that is so."""
    return next((why for part, why in NOT_RUN.items() if re.search(part, line)), None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)


@contextmanager
def somewhere(folder: Path, where: str) -> Iterator[Player]:
    """A player in this process (`embedded`), or at a server that is there (`on a server`)."""
    if where == "embedded":
        yield Player(folder)
        return
    with serving(folder) as server:
        yield Player(folder, server)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
