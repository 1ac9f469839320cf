"""What all workers have in common: loads come as lines on stdin, one answer is written to each.

A worker is a program of its own, in whichever environment: it imports nothing of Weaver's but this
and `cases`, which need the standard library alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers.cases import Load

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 30_000
"""Token ids of data are below it, whatever the model has."""
started = float(os.environ.get("BENCH_STARTED", time.time()))


def sequences(load: Load) -> list[list[int]]:
    """One of each length; of one more token, which is the last target."""
    rng = random.Random(load.turn)
    return [[rng.randrange(VOCABULARY) for _ in range(n + 1)] for n in load.lengths]


def prompts(load: Load) -> list[list[int]]:
    """One for each reply; others in each round, so that nothing is known of the last one."""
    rng = random.Random(load.turn)
    common = [rng.randrange(VOCABULARY) for _ in range(load.shared)]
    return [common + [rng.randrange(VOCABULARY) for _ in range(load.prompt)] for _ in load.lengths]


def learned_from(load: Load, length: int) -> int:
    """The first position that is trained."""
    return length - max(1, round(load.learned * length))


def device() -> tuple[str, str]:
    """Where a peer computes, and in which dtype; Weaver finds both itself."""
    name = os.environ["WEAVER_DEVICE"]
    return name, "bfloat16" if name.startswith("cuda") else "float32"


def _await_device() -> None:
    """What was asked of a GPU is done."""
    if (torch := sys.modules.get("torch")) and device()[0] != "cpu":
        torch.cuda.synchronize()


def _peak_bytes() -> int:
    """The most memory that was taken: of the GPU, if there is one, else of this process.

    Linux begins the `ru_maxrss` of a process with that of its parent.
    """
    if (torch := sys.modules.get("torch")) and device()[0] != "cpu":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(peak[1])
    peak_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_size if sys.platform == "darwin" else 1024 * peak_size


def serve(make: Callable[[], Callable[[Load], Any]]) -> None:
    """Answers lines until stdin ends. What `make` answers does one round, untimed setup aside.

    A round may answer its own seconds, where they are not those of the call.
    """
    out = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    run: Callable[[Load], Any] | None = None
    for line in sys.stdin:
        load, answer = Load.of(json.loads(line)), dict[str, Any]()
        try:
            run = run or make()
            began = time.perf_counter()
            seconds = run(load)
            _await_device()
            answer["seconds"] = seconds if seconds is not None else time.perf_counter() - began
            answer["since_start"] = time.time() - started
        except Exception as error:  # told, so that the others go on
            answer["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        answer["peak_bytes"] = _peak_bytes()
        os.write(out, f"{json.dumps(answer)}\n".encode())
