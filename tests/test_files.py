"""Locks of folders: one holder, named; they end with the process, forks or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from weaver.errors import ConflictError
from weaver.files import hold_lock, release_lock

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import os, sys, time
from pathlib import Path
from weaver.files import hold_lock
hold_lock(Path(sys.argv[1]), what="it", hint="")
if not (child := os.fork()):
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = hold_lock(tmp_path / "new", what="the folder", hint="Wait.")
    with pytest.raises(ConflictError, match=rf"the folder is .* \(process {os.getpid()} on .*Wait"):
        hold_lock(tmp_path / "new", what="the folder", hint="Wait.")
    release_lock(lock)
    release_lock(hold_lock(tmp_path / "new", what="the folder", hint="Wait."))


def test_a_fork_does_not_prolong_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    with pytest.raises(ConflictError, match=f"process {holder.pid} "):
        hold_lock(tmp_path, what="it", hint="")
    holder.kill()
    holder.wait()
    os.kill(child, 0)  # it is alive
    deadline = time.monotonic() + 5
    while True:  # the child closes what it inherited when it begins
        try:
            release_lock(hold_lock(tmp_path, what="it", hint=""))
            break
        except ConflictError:
            assert time.monotonic() < deadline
    os.kill(child, signal.SIGKILL)
    holder.stdout.close()
