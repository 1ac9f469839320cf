"""Resume, the whole way: a run that is killed at random moments ends with the same weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from random import Random, randrange
from typing import TYPE_CHECKING

import pytest

from tests.rl.killable import STEPS
from weaver import ServiceClient
from weaver_rl.report import write_report
from weaver_rl.run_folder import RunFolder
from weaver_rl.storage import read_lines
from weaver_rl.transcripts import steps_with_transcripts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VARYING = ("time", "tokens/per_second")


@contextmanager
def running(folder: Path, loop: str) -> Iterator[subprocess.Popen[bytes]]:
    """The run in a process of its own, which leaving the block ends by SIGKILL."""
    home = str(folder.parent / f"{folder.name}-home")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.rl.killable", str(folder), loop],
        env={**os.environ, "WEAVER_HOME": home, "WEAVER_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(folder: Path, loop: str) -> str:
    """Runs to the end; the digest of the final weights."""
    with running(folder, loop) as process:
        assert process.wait() == 0
    saved = (folder.parent / f"{folder.name}-home").rglob("final/adapter_model.safetensors")
    # A run that was killed behind its last step saves its weights once more: they are the same.
    (digest,) = {hashlib.sha256(weights.read_bytes()).hexdigest() for weights in saved}
    return digest


def kill_at(folder: Path, loop: str, step: int, *, delay_s: float) -> None:
    """Kills the run that long after it logged `step`, in the midst of whatever it does then."""
    with running(folder, loop) as process:
        while len(read_lines(folder / "metrics.jsonl")) < step:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        time.sleep(delay_s)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("loop", ["on_policy", "off_policy", "rejection", "supervised"])
def test_killed_at_three_random_steps_the_weights_are_the_same(loop: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(whole, loop)
    seed = randrange(10**6)
    rng = Random(seed)
    for step in sorted(rng.sample(range(1, STEPS), 3)):
        kill_at(killed, loop, step, delay_s=rng.uniform(0.0, 0.2))
    last_start = time.time()
    assert finish(killed, loop) == expected, f"seed {seed}"

    ours, theirs = read_lines(killed / "metrics.jsonl"), read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(VARYING)} == {
            k: v for k, v in other.items() if not k.startswith(VARYING)
        }
    assert ours[1]["time"] < last_start  # it went on, and did not start over
    with ServiceClient(home=tmp_path / "killed-home") as service:
        (run,) = service.list_training_runs()
        logged = service.attach("killed").read_metrics("train/loss")
    assert run.name == "killed" and [one.step for one in logged] == list(range(1, STEPS + 1))
    if loop != "supervised":
        assert steps_with_transcripts(killed / "transcripts") == list(range(1, STEPS + 1))
    assert write_report(RunFolder(killed)).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_that_move_in_flight_go_on_behind_the_last_checkpoint(tmp_path: Path) -> None:
    """Not bit for bit; but every step once, and none of what was drawn is too old."""
    folder = tmp_path / "run"
    for step in (3, 8):
        kill_at(folder, "in_flight", step, delay_s=0.1)
    finish(folder, "in_flight")
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["staleness/max"] for row in rows) <= 2
    assert {row["rollout/count"] for row in rows} == {16.0}
    assert steps_with_transcripts(folder / "transcripts") == list(range(1, STEPS + 1))
