"""Another project's ids at every command that takes one: answered as what does not exist."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest

from tests.cli.test_commands import commands, weaver
from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver.cli.harnesses import Harness
from weaver.client.http import HttpService
from weaver.errors import WeaverError
from weaver.protocol import GradientsDone, StepDone
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUN = [
    ("runs", "show"),
    ("runs", "watch", "--once"),
    ("runs", "tail"),
    ("runs", "rename"),
    ("runs", "stop"),
    ("runs", "delete", "--yes"),
    ("runs", "delete", "--yes", "--checkpoints"),
    ("checkpoints", "list", "--run"),
    ("checkpoints", "delete", "--yes", "--run"),
]
PATH = [
    ("checkpoints", "show"),
    ("checkpoints", "delete", "--yes"),
    ("checkpoints", "export", "--to", "FOLDER"),
    ("checkpoints", "export", "--to", "FOLDER", "--merge"),
    ("checkpoints", "ttl"),
    ("sample", "hello", "--model"),
    ("chat", "--model"),
]
EVAL = ("checkpoints", "eval", "--tasks", "x", "--out", "FOLDER")
NO_ID = {("serve",), ("doctor",), ("sessions",), ("runs", "list"), ("models", "list")}
NO_ID |= {("cluster", "status"), ("cluster", "install-sampler")}  # of this machine
NO_ID |= {("up",), ("logs",)}
NO_TENANT = {("keys", "create"), ("keys", "list"), ("keys", "revoke")}
"""They open the database of a server on this machine."""
NO_OWNER = {("models", "check"), ("models", "download"), ("checkpoints", "import")}


class Alice(NamedTuple):
    run: str
    path: str
    secret: str


@pytest.fixture
def alice(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Alice]:
    """A server with a run and a checkpoint of hers; commands have the key of another project."""
    database = open_database(home)
    keys = {name: Keys(database).create(name)[1] for name in ("alice", "bob")}
    database.dispose()

    async def train(address: str) -> tuple[str, str]:
        async with HttpService(address, api_key=keys["alice"]) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(STEP, StepDone, run_id=run)
            return run, await caller.save(run, "sampler", name="best")

    with serving(FakeEngine(), ServerSettings(home=home, port=0)) as server:
        monkeypatch.setenv("WEAVER_BASE_URL", server.address)
        monkeypatch.setenv("WEAVER_API_KEY", keys["bob"])
        monkeypatch.setenv("WEAVER_HOME", str(home / "client"))
        yield Alice(*anyio.run(train, server.address), keys["alice"])


def refusal(words: tuple[str, ...], given: str, folder: Path) -> tuple[str, str]:
    """The class and the text of the error, with `...` for the id."""
    arguments = [str(folder) if word == "FOLDER" else word for word in words]
    last = {"ttl": ["60"], "rename": ["words"]}.get(words[1], [])
    with pytest.raises(WeaverError) as raised:
        weaver(*arguments, given, *last, stdin="hello\n\n")
    return type(raised.value).__name__, str(raised.value).replace(given, "...")


def test_what_is_anothers_is_answered_as_what_is_nowhere(alice: Alice, tmp_path: Path) -> None:
    nobody = f"run-{'0' * (len(alice.run) - 4)}"
    nowhere = alice.path.replace(alice.run, nobody)
    short = alice.run.removeprefix("run-")[:6]
    folder = tmp_path / "out"
    for words in RUN:
        told = refusal(words, alice.run, folder)
        assert told == refusal(words, nobody, folder), words
        if words[1] != "list":  # which takes no abbreviation
            assert refusal(words, short, folder) == refusal(words, "zzzzzz", folder), words
    for words in PATH:
        told = refusal(words, alice.path, folder)
        assert told == refusal(words, nowhere, folder), words
        if words[0] == "checkpoints":
            assert refusal(words, "best", folder) == refusal(words, "worst", folder), words
    for words in (("runs", "list"), ("checkpoints", "list"), ("sessions",)):
        assert json.loads(weaver(*words, "-o", "json")) == []
    assert not folder.exists()


def test_it_is_all_still_there_for_its_own_project(
    alice: Alice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (*RUN, *PATH):
        refusal(words, alice.path if words in PATH else alice.run, tmp_path / "out")
    monkeypatch.setenv("WEAVER_API_KEY", alice.secret)
    assert json.loads(weaver("runs", "show", alice.run, "-o", "json"))["step"] == 1
    assert json.loads(weaver("checkpoints", "show", "best", "-o", "json"))["expires_at"] is None
    assert weaver("sample", "hi", "--model", alice.path, "--max-tokens", "2")
    assert weaver("runs", "stop", alice.run) and weaver("runs", "delete", alice.run, "--yes")
    assert json.loads(weaver("checkpoints", "list", "-o", "json"))[0]["path"] == alice.path


def test_evaluating_is_refused_alike(
    alice: Alice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Harness, "check", lambda self: None)  # as if the tool were installed
    nowhere = alice.path.replace(alice.run, f"run-{'0' * (len(alice.run) - 4)}")
    told = refusal(EVAL, alice.path, tmp_path / "out")
    assert told == refusal(EVAL, nowhere, tmp_path / "out")
    assert "eval" not in told[1]


def test_no_command_is_left_out() -> None:
    tried = {words[:2] for words in (*RUN, *PATH, EVAL) if words[0] not in ("sample", "chat")}
    assert commands().keys() == (tried | {("sample",), ("chat",)} | NO_ID | NO_TENANT | NO_OWNER)
