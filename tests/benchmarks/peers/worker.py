"""What all workers have in common: loads come as lines on stdin, one answer is written to each.

A worker is a program of its own, in whichever environment: it imports nothing of Weaver's but this
and `cases`, which need the standard library alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers.cases import Load

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 30_000
"""Token ids of data are below it, whatever the model has."""
started = float(os.environ.get("BENCH_STARTED", time.time()))


def sequences(load: Load) -> list[list[int]]:
    """One of each length; of one more token, which is the last target."""
    rng = random.Random(sum(load.lengths))
    return [[rng.randrange(VOCABULARY) for _ in range(n + 1)] for n in load.lengths]


def prompts(load: Load) -> list[list[int]]:
    """One for each reply."""
    rng = random.Random(1)
    common = [rng.randrange(VOCABULARY) for _ in range(load.shared)]
    return [common + [rng.randrange(VOCABULARY) for _ in range(load.prompt)] for _ in load.lengths]


def learned_from(load: Load, length: int) -> int:
    """The first position that is trained."""
    return length - max(1, round(load.learned * length))


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
            answer["seconds"] = seconds if seconds is not None else time.perf_counter() - began
            answer["since_start"] = time.time() - started
        except Exception as error:  # told, so that the others go on
            answer["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        answer["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(out, f"{json.dumps(answer)}\n".encode())
