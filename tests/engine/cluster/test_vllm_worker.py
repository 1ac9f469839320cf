"""The program of vLLM's workers can be run where there is no weaver."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.cluster.standin import PROGRAM

STARTING = """
import multiprocessing, os, time
from types import SimpleNamespace

class AsyncEngineArgs(SimpleNamespace):
    pass

def core(inner):
    with open("pids", "a") as file:
        print(os.getpid(), file=file)
    if inner:
        spawn(inner - 1)
    time.sleep(100)

def spawn(inner):
    child = multiprocessing.get_context("spawn").Process(target=core, args=(inner,))
    child.start()
    child.join()

class AsyncLLM:
    from_engine_args = staticmethod(lambda arguments: spawn(1))
"""
"""As vLLM's engine, which spawns processes that spawn others, and takes long to start."""


def test_it_imports_nothing_of_weaver() -> None:
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"vllm"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends processes with their parents")
def test_a_worker_that_ends_while_it_starts_leaves_no_process(tmp_path: Path) -> None:
    engine = tmp_path / "vllm" / "v1" / "engine"
    engine.mkdir(parents=True)
    for folder in (engine, engine.parent, engine.parent.parent):
        (folder / "__init__.py").write_text("")
    (tmp_path / "vllm" / "__init__.py").write_text(STARTING)
    (engine / "async_llm.py").write_text("from vllm import AsyncLLM")
    worker = subprocess.Popen(
        [sys.executable, PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        assert worker.stdin is not None
        frame = json.dumps({"do": "start", "engine": {}, "packages": []}).encode()
        worker.stdin.write(len(frame).to_bytes(4, "big") + frame)
        worker.stdin.flush()
        file = tmp_path / "pids"
        waited(lambda: file.exists() and file.read_text().count("\n") == 2)
        spawned = [Path("/proc", pid) for pid in file.read_text().split()]
        assert all(each.exists() for each in spawned)
    finally:
        worker.kill()
        worker.communicate()
    waited(lambda: not any(each.exists() for each in spawned))


def waited(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)
