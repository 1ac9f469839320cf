"""What the shell offers, asked as bash asks: names as they are, in a second, and never an error."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.cli.test_commands import saved, weaver
from tests.fake_engine import FakeEngine
from weaver.cli import completion
from weaver.client.http import HttpService
from weaver.config import environment
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.keys import Keys
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["saved"]  # a fixture


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A completion says nothing from then on, which is for its own process to keep."""
    yield
    logging.disable(logging.NOTSET)


LONG_S = 30.0
"""In place of the second that people are kept waiting: this machine may have other work."""


def offered(*words: str) -> list[str]:
    """By `weaver`, in a process of its own, behind these words, of which the last is begun."""
    code = f"""
import sys
from weaver.cli import completion, main
completion.PATIENCE_S = {LONG_S}
sys.argv[0] = "weaver"
main()
"""
    asked = {
        "_WEAVER_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("weaver", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "" and done.returncode == 0
    return done.stdout.split()


def test_a_server_is_asked(saved: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "PATIENCE_S", LONG_S)
    run, path = saved

    async def name() -> str:
        async with HttpService(environment()["WEAVER_BASE_URL"]) as service:
            return (await service.rename_run(run, "my-run")).name or ""

    assert anyio.run(name) == "my-run"
    assert offered("runs", "show", "") == ["my-run", run]
    assert offered("runs", "stop", "my") == ["my-run"]
    assert offered("checkpoints", "list", "--run", "run-") == [run]
    assert completion.checkpoints("") == [path.removeprefix("weaver://")]
    assert completion.checkpoints("weaver://") == [path]
    assert completion.models("") == ["weaver-nano", "fake"]
    assert completion.models("f") == ["fake"]
    assert completion.models("weaver://run") == [path]
    shown = weaver("checkpoints", "show", path.removeprefix("weaver://"), "-o", "tsv")
    assert path in shown  # what is offered is taken


def test_a_home_is_read_without_an_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "PATIENCE_S", LONG_S)
    monkeypatch.setenv("WEAVER_HOME", str(home))
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    assert completion.runs("") == [] and completion.checkpoints("") == []
    assert completion.projects("") == [] and not home.exists()  # nothing is made

    async def work() -> str:
        from tests.contracts.caller import Caller

        database = open_database(home, file="embedded.db")
        engine = FakeEngine()
        async with LocalService(engine, home=home, store=Journal(database, keeps="runs")) as made:
            caller = await Caller.open(made)
            run = await caller.create()
            await caller.save(run, "sampler", name="best")
        database.dispose()
        return run

    run = anyio.run(work)
    Keys(open_database(home)).create("research")
    assert run in completion.runs("run-")
    assert completion.checkpoints("run-") == [f"{run}/sampler/best"]
    assert completion.models("weaver-n") == ["weaver-nano"]
    assert offered("keys", "create", "--project", "re") == ["research"]


def test_what_is_out_of_reach_is_silence_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, answers nothing
        for port in (silent.getsockname()[1], 9):
            monkeypatch.setenv("WEAVER_BASE_URL", f"http://127.0.0.1:{port}")
            began = time.monotonic()
            assert completion.runs("") == [] == completion.models("")
            assert time.monotonic() - began < 2 * completion.PATIENCE_S + 2
    monkeypatch.setenv("WEAVER_BASE_URL", "nonsense")
    assert completion.runs("") == []
    monkeypatch.setenv("WEAVER_THREADS", "many")
    assert completion.checkpoints("") == []
