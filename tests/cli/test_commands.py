"""The commands of `weaver`, run in process; the server of `serve` is in test_serve.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import typer
from typer.testing import CliRunner

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from tests.server.test_imports import adapter, written
from weaver.cli import app
from weaver.cli.output import find
from weaver.client.http import HttpService
from weaver.errors import InvalidNameError, NotFoundError, StorageError, WeaverError
from weaver.protocol import GradientsDone, StepDone
from weaver.server.settings import ServerSettings
from weaver.types import MetricPoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def weaver(*arguments: str, stdin: str | None = None) -> str:
    """What the command writes to stdout; its error, if it fails."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def saved(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A server with a run and its checkpoint, chosen by WEAVER_BASE_URL."""

    async def train(address: str) -> tuple[str, str]:
        async with HttpService(address) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(STEP, StepDone, run_id=run)
            await service.log_metrics(run, [MetricPoint(name="loss", value=0.5)])
            return run, await caller.save(run, "sampler", name="best")

    engine = FakeEngine(models=("weaver-nano", "fake"))
    with serving(engine, ServerSettings(home=home, port=0, auth=False)) as server:
        monkeypatch.setenv("WEAVER_BASE_URL", server.address)
        monkeypatch.setenv("WEAVER_HOME", str(home / "client"))
        yield anyio.run(train, server.address)


def test_lists_and_details(saved: tuple[str, str]) -> None:
    run, path = saved
    assert run in weaver("runs", "list") and path in weaver("checkpoints", "list")
    assert [r["run_id"] for r in json.loads(weaver("runs", "list", "-o", "json"))] == [run]
    assert [c["path"] for c in json.loads(weaver("checkpoints", "list", "-o", "json"))] == [path]
    assert json.loads(weaver("checkpoints", "list", "--run", run, "-o", "json"))[0]["step"] == 1
    short = run.removeprefix("run-")[:8]
    shown = json.loads(weaver("runs", "show", short, "-o", "json"))
    assert shown["run_id"] == run and shown["metrics"] == {"loss": 0.5}
    assert json.loads(weaver("checkpoints", "show", "best", "-o", "json"))["path"] == path
    names = [m["name"] for m in json.loads(weaver("models", "list", "-o", "json"))]
    assert names == ["weaver-nano", "fake"]
    assert "context_length" in weaver("models", "check", "fake")


def test_checkpoints_expire_and_go(saved: tuple[str, str]) -> None:
    _, path = saved
    assert "never" not in weaver("checkpoints", "ttl", "best", "3600")
    assert "never" in weaver("checkpoints", "ttl", path, "none")
    with pytest.raises(WeaverError, match="seconds"):
        weaver("checkpoints", "ttl", path, "soon")
    with pytest.raises(SystemExit):
        weaver("checkpoints", "delete", "best", stdin="n\n")
    assert path in weaver("checkpoints", "list")
    assert path in weaver("checkpoints", "delete", "best", "--yes")
    assert weaver("checkpoints", "list") == "No checkpoints.\n"
    assert json.loads(weaver("checkpoints", "list", "-o", "json")) == []


def test_runs_stop_and_go(saved: tuple[str, str]) -> None:
    run, path = saved
    short = run.removeprefix("run-")[:8]
    assert f"Stopped {run} at step 1" in weaver("runs", "stop", short)
    assert json.loads(weaver("runs", "show", short, "-o", "json"))["status"] == "stopped"
    with pytest.raises(SystemExit):
        weaver("runs", "delete", short, stdin="n\n")
    assert run in weaver("runs", "delete", short, "--yes")
    assert weaver("runs", "list") == "No runs.\n" and path in weaver("checkpoints", "list")
    assert path in weaver("checkpoints", "list", "--run", short)
    with pytest.raises(NotFoundError, match="no runs match"):
        weaver("runs", "stop", short)


def test_a_run_is_found_by_its_name(saved: tuple[str, str]) -> None:
    run, path = saved
    assert weaver("runs", "rename", run, "words") == f"{run} is called words now.\n"
    assert f"{run}  words  " in weaver("runs", "list")
    assert json.loads(weaver("runs", "show", "words", "-o", "json"))["run_id"] == run
    assert (
        json.loads(weaver("checkpoints", "list", "--run", "words", "-o", "json"))[0]["path"] == path
    )
    assert f"words ({run})" in weaver("runs", "watch", "words", "--once")
    assert weaver("runs", "tail", "wor") == ""
    assert weaver("runs", "rename", "words", "words") == f"words ({run}) is called words now.\n"
    with pytest.raises(InvalidNameError, match="name: is 'run-0123456789ab'"):
        weaver("runs", "rename", "words", "run-0123456789ab")
    assert f"Stopped words ({run})" in weaver("runs", "stop", "words")
    assert f"Deleted words ({run})" in weaver("runs", "delete", "words", "--yes")


def test_a_run_goes_with_its_checkpoints_if_that_is_asked(saved: tuple[str, str]) -> None:
    assert "and its checkpoints" in weaver("runs", "delete", saved[0], "--checkpoints", "--yes")
    assert weaver("checkpoints", "list") == "No checkpoints.\n"


def test_checkpoints_are_exported(saved: tuple[str, str], tmp_path: Path) -> None:
    _, path = saved
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    assert weaver("checkpoints", "export", "best", "--to", str(adapter)) == (
        f"Wrote {path} to {adapter}.\n"
    )
    assert (adapter / "weight.npy").is_file()
    weaver("checkpoints", "export", path, "--to", str(model), "--merge")
    assert {f.name for f in model.iterdir()} == {"model.npy", "README.md"}
    with pytest.raises(StorageError, match="exists already"):
        weaver("checkpoints", "export", path, "--to", str(model))


def test_many_checkpoints_are_deleted(saved: tuple[str, str]) -> None:
    run, path = saved
    for options in (
        ("--pattern", "b*", "--older-than", "1d"),
        ("--pattern", "nothing"),
        ("--run", run, "--pattern", "c*"),
    ):
        told = weaver("checkpoints", "delete", *options, "--yes")
        assert told == "No checkpoints.\nWould delete 0 checkpoints of 0 bytes.\n"
    told = weaver("checkpoints", "delete", "--older-than", "0s", "--dry-run")
    assert path in told and "Would delete 1 checkpoints" in told
    assert f"Would delete {path}" in weaver("checkpoints", "delete", "best", "--dry-run")
    with pytest.raises(SystemExit):
        weaver("checkpoints", "delete", "--pattern", "b*", stdin="n\n")
    assert path in weaver("checkpoints", "list")
    told = weaver("checkpoints", "delete", "--run", run[:9], "--pattern", "b*", "--yes")
    assert "Deleted 1 checkpoints of" in told
    assert weaver("checkpoints", "list") == "No checkpoints.\n"
    for wrong in ((), ("best", "--pattern", "b*"), ("--older-than", "soon"), ("--older-than", "d")):
        with pytest.raises(WeaverError):
            weaver("checkpoints", "delete", *wrong, "--yes")


def test_an_adapter_is_imported(saved: tuple[str, str], tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", adapter())
    path = weaver("checkpoints", "import", str(folder), "--name", "mine").strip()
    assert path.endswith("/weights/mine")
    assert json.loads(weaver("checkpoints", "show", path, "-o", "json"))["base_model"] == "fake"
    with pytest.raises(WeaverError, match="elsewhere"):
        weaver("checkpoints", "import", str(folder), "--base-model", "elsewhere")


def test_sessions_are_listed(saved: tuple[str, str]) -> None:
    [row] = json.loads(weaver("sessions", "-o", "json"))
    assert row["session_id"] in weaver("sessions") and row["pending"] == 0


def test_sample_and_chat(saved: tuple[str, str]) -> None:
    _, path = saved
    assert len(weaver("sample", "hi", "-n", "2", "--max-tokens", "4").splitlines()) >= 2
    once = weaver("sample", "-", "--model", path, "--seed", "1", "-o", "json", stdin="hi")
    assert once == weaver("sample", "hi", "--model", path, "--seed", "1", "-o", "json")
    assert json.loads(once)["sequences"][0]["weights_version"] == 1
    assert weaver("chat", "--max-tokens", "4", stdin="hello\nagain\n\n").count("> ") == 3


def test_doctor(saved: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "answers:" in weaver("doctor")
    assert "answers:" in weaver("doctor", "--model", "fake")
    result = CliRunner().invoke(app, ["doctor", "--model", "none"])
    assert result.exit_code == 1 and "FAILED" in result.stdout and "none" in result.stdout


def test_doctor_says_whether_a_model_fits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(home))
    said = weaver("doctor")
    assert "272,096 parameters; needs 4.7 MB of " in said and "1.1 MB weights" in said
    assert re.search(r"training +passes of 4,096 tokens in .* 0 of 2 layers recomputed", said)
    assert re.search(r"base models +.* GB together, or one .*; this one takes 2.2 MB at most", said)
    assert re.search(r"full tuning +4.4 MB for weights.*sequences of up to 1,024 tokens", said)
    assert "answers:" in said
    monkeypatch.setenv("WEAVER_MEMORY_GB", "0.008")
    said = weaver("doctor")
    assert re.search(r"free memory +8.0 MB \(as set\)", said)
    assert re.search(r"training +passes of \d+ tokens in .* 2 of 2 layers recomputed", said)
    monkeypatch.delenv("WEAVER_MEMORY_GB")
    monkeypatch.setenv("WEAVER_MODEL_MEMORY_GB", "0.002")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAILED: base_model: weaver-nano takes 2.2 MB" in result.stdout
    monkeypatch.delenv("WEAVER_MODEL_MEMORY_GB")
    monkeypatch.setattr("weaver.engine.torch.engine.free_bytes", lambda place: 4_700_000)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "DOES NOT FIT" in result.stdout
    assert "answers:" not in result.stdout  # it was not loaded


def test_doctor_says_with_what_it_would_compute(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(home))
    monkeypatch.setenv("WEAVER_THREADS", "1")
    said = dict(line.split(maxsplit=1) for line in weaver("doctor").splitlines())
    assert re.fullmatch(r"cpu \(auto: .*CUDA.*\)", said["device"])
    assert re.fullmatch(r"float32 \(auto: .*\)", said["dtype"])
    assert said["threads"] == "1 thread" and said["home"] == f"{home}, which can be written to"
    assert re.fullmatch(r"64 at once, .* GB of keys and values \(.* tokens\)", said["samples"])
    assert {"weaver", "python", "torch", "transformers"} <= said.keys()
    monkeypatch.setenv("WEAVER_DTYPE", "bfloat16")
    assert re.search(r"dtype +bfloat16 \(as set\)", weaver("doctor"))


def test_doctor_names_every_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", "/proc/nowhere")
    monkeypatch.setenv("WEAVER_DEVICE", "gpu")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "answers:" not in result.stdout
    assert re.search(r"home +FAILED: .*cannot be written to.*WEAVER_HOME", result.stdout)
    assert re.search(r"device +FAILED: .*'gpu'.*auto, cpu, cuda", result.stdout)
    monkeypatch.setenv("WEAVER_DTYPE", "int8")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert re.search(r"settings +FAILED: WEAVER_DTYPE.*'int8'.*auto, float32 or", result.stdout)


def test_doctor_says_which_extras_are_not_installed(
    saved: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package in ("wandb", "torch"):
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("weaver.cli.doctor.version", version)
    said = weaver("doctor")  # with a server, none of them is needed here
    assert re.search(r"home +/.*, which can be written to", said)
    assert re.search(r"torch +not installed", said) and re.search(r"extras +.*server", said)
    assert 'engine,wandb; if wanted: pip install "weaver-post-training[engine,wandb]"' in said


def test_a_server_out_of_reach_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weaver.cli import main

    monkeypatch.setattr("weaver.client.http.FIRST_CONTACT_S", 0.1)
    monkeypatch.setenv("WEAVER_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["weaver", "runs", "list"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.startswith("error: http://127.0.0.1:1 cannot be reached")
    assert said.count("\n") == 1


def test_keys(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(home))
    assert "No keys" in weaver("keys", "list")
    secret = weaver("keys", "create", "--project", "alice", "--name", "laptop").strip()
    assert secret.startswith("wv-")
    made = json.loads(weaver("keys", "create", "--project", "ops", "--admin", "-o", "json"))
    assert made["key"].startswith("wv-") and made["admin"]
    listed = weaver("keys", "list")
    assert "alice" in listed and "laptop" in listed and secret not in listed
    assert made["id"] in weaver("keys", "revoke", made["id"][:6])
    rows = json.loads(weaver("keys", "list", "-o", "json"))
    assert [row["revoked_at"] is None for row in rows] == [True, False]
    assert all("hash" not in row and "key" not in row for row in rows)
    with pytest.raises(NotFoundError, match="no keys match 'zz'"):
        weaver("keys", "revoke", "zz")


def test_ids_may_be_abbreviated_if_they_stay_unique() -> None:
    ids = ["run-ab12", "run-ab34", "run-cd56"]

    def pick(given: str) -> str:
        return find(given, ids, name=str, what="runs")

    assert pick("run-ab12") == "run-ab12" and pick("cd") == pick("run-c") == "run-cd56"
    paths = ["weaver://run-1/weights/best", "weaver://run-1/weights/best-2"]

    def pick_path(given: str) -> str:
        return find(given, paths, name=str, what="checkpoints", within=True)

    aliases = {"run-ab12": "words", "run-ab34": "words-2", "run-cd56": "ab"}

    def pick_alias(given: str) -> str:
        return find(given, ids, name=str, alias=aliases.get, what="runs")

    assert pick_alias("words") == "run-ab12" and pick_alias("words-") == "run-ab34"
    assert pick_alias("ab") == "run-cd56" and pick_alias("ab3") == "run-ab34"
    assert pick_path("best") == pick_path("weights/best") == paths[0]
    assert pick_path("-2") == paths[1]
    with pytest.raises(NotFoundError, match=f"2 checkpoints match 'run-1': {paths[0]}, {paths[1]}"):
        pick_path("run-1")
    for given, message in (
        ("ab", "2 runs match 'ab': run-ab12, run-ab34"),
        ("x", "no runs"),
        ("", "no"),
    ):
        with pytest.raises(NotFoundError, match=message):
            pick(given)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    def run(instruction: str, **words: str) -> str:
        code = "import sys; sys.argv = ['weaver']; from weaver.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "_WEAVER_COMPLETE": f"{instruction}_{shell}", **words},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    script = run("source")
    assert f"complete_{shell}" in script and "weaver" in script
    line = {"COMP_WORDS": "weaver ru", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "weaver ru"}
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "runs" in run("complete", **line, **fish)
    assert "checkpoints" not in run("complete", **line, **fish)


def test_every_list_has_formats() -> None:
    lists = [path for path in commands() if path[-1] in ("list", "sessions")]
    assert len(lists) == 5
    for path in lists:
        told = weaver(*path, "--help")
        assert "<table|json|tsv>" in told and "--wide" in told, path


def commands() -> dict[tuple[str, ...], Any]:
    """Every command by its words."""
    root: Any = typer.main.get_command(app)
    groups = {(name,): command for name, command in root.commands.items()}
    below = {
        (*words, name): command
        for words, group in groups.items()
        for name, command in getattr(group, "commands", {}).items()
    }
    return {words: c for words, c in (groups | below).items() if not hasattr(c, "commands")}


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from weaver.cli import app; "
        "from typer.testing import CliRunner; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0; "
        "heavy = {'torch', 'numpy', 'pydantic', 'httpx', 'fastapi', 'sqlalchemy', 'anyio'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_output_that_cannot_be_written_is_one_line(saved: tuple[str, str]) -> None:
    code = "import sys; sys.argv = ['weaver', 'runs', 'list']; from weaver.cli import main; main()"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode != 0
    assert ended.stderr.startswith(b"error: ") and b"Traceback" not in ended.stderr


def test_a_list_on_a_terminal_keeps_to_its_width(saved: tuple[str, str]) -> None:
    code = "import sys; sys.argv[0] = 'weaver'; from weaver.cli import main; main()"
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", code, "checkpoints", "list", "--run", saved[0][4:9]]
    environment = {**os.environ, "COLUMNS": "90", "TERM": "xterm"}
    ended = subprocess.run(command, stdout=theirs, env=environment)
    os.close(theirs)
    lines = re.sub(r"\x1b\[[\d;]*m", "", os.read(ours, 10_000).decode()).splitlines()
    os.close(ours)
    assert ended.returncode == 0
    assert max(map(len, lines)) <= 90
    first = "".join(line.partition(" ")[0] for line in lines)
    assert first == f"path{saved[1]}"
    with pytest.raises(NotFoundError, match="no runs match"):
        weaver("checkpoints", "list", "--run", "nobody")
