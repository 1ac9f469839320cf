"""Resume, the whole way: a run that is killed again and again ends with the same weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from weaver_rl.report import write_report
from weaver_rl.run_folder import RunFolder
from weaver_rl.storage import read_lines
from weaver_rl.transcripts import steps_with_transcripts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = 8
SCRIPT = f"""
import sys
import weaver_rl as rl
from weaver.types import SamplingParams
from weaver_rl.tasks.words import exact, reverse_tasks

rl.train(
    "weaver-nano", reverse_tasks(20), exact, steps={STEPS}, groups_per_step=4, group_size=4,
    sampling=SamplingParams(max_tokens=12), folder=sys.argv[1], resume=True,
    checkpoint_every=2, display=False,
)
"""
VARYING = ("time", "tokens/per_second")


def start(folder: Path) -> subprocess.Popen[bytes]:
    home = str(folder.parent / f"{folder.name}-home")
    environment = {**os.environ, "WEAVER_HOME": home, "WEAVER_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment)


def finish(folder: Path) -> str:
    """Runs to the end; the digest of the final weights."""
    with killing(start(folder)) as process:
        assert process.wait() == 0
    (weights,) = (folder.parent / f"{folder.name}-home").rglob("final/adapter_model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def kill_at(folder: Path, step: int, *, delay_s: float) -> None:
    """Kills the run that long after it logged `step`, in the midst of whatever it does then."""
    with killing(start(folder)) as process:
        while len(read_lines(folder / "metrics.jsonl")) < step:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        time.sleep(delay_s)


@contextmanager
def killing(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_three_times_the_weights_are_the_same(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(whole)
    for step, delay_s in ((1, 0.05), (3, 0.0), (6, 0.11)):
        kill_at(killed, step, delay_s=delay_s)
    last_start = time.time()
    assert finish(killed) == expected

    ours, theirs = read_lines(killed / "metrics.jsonl"), read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(VARYING)} == {
            k: v for k, v in other.items() if not k.startswith(VARYING)
        }
    assert ours[3]["time"] < last_start  # it went on, and did not start over
    assert steps_with_transcripts(killed / "transcripts") == list(range(1, STEPS + 1))
    assert write_report(RunFolder(killed)).stat().st_size > 10_000
