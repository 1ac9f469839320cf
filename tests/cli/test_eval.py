"""`weaver checkpoints eval` without the tools: what it refuses, and which tool a task is for.

With them it is tried in tests/clients/test_eval.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.test_commands import weaver
from weaver.cli import evaluation, harnesses
from weaver.config import Settings
from weaver.errors import (
    ConfigError,
    InvalidParamsError,
    MissingDependencyError,
    NameTakenError,
    OperationError,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("task", ["arc_easy", "mine.py"])
def test_a_tool_that_is_not_installed_is_named(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harnesses, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"weaver-post-training\[eval\]"):
        weaver("checkpoints", "eval", "weaver-nano", "--tasks", task)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "tool"),
    [
        ("arc_easy", "lm-eval"),
        ("mine.yaml", "lm-eval"),
        ("a/b/mine.yml", "lm-eval"),
        ("mine.py", "inspect-ai"),
        ("a/mine.py@one", "inspect-ai"),
        ("inspect_evals/gsm8k", "inspect-ai"),
    ],
)
def test_a_task_tells_its_tool(task: str, tool: str) -> None:
    assert harnesses.harness_of(task).name == tool


@pytest.mark.parametrize("tasks", ["", ",", "--model", "a,--tasks"])
def test_what_is_no_task_is_refused(tasks: str) -> None:
    with pytest.raises(InvalidParamsError, match="tasks"):
        weaver("checkpoints", "eval", "weaver-nano", f"--tasks={tasks}")


def test_a_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harnesses, "find_spec", lambda name: True)
    (tmp_path / "kept").touch()
    with pytest.raises(NameTakenError, match=str(tmp_path)):
        weaver("checkpoints", "eval", "weaver-nano", "--tasks", "a", "--out", str(tmp_path))


def test_a_tool_that_fails_or_writes_nothing_is_an_error(tmp_path: Path) -> None:
    target: dict[str, Any] = {"address": "http://localhost:1", "api_key": "", "model": "m"}
    given = harnesses.Target(
        **target,
        context_length=9,
        tokenizer=tmp_path,
        concurrency=1,
        limit=None,
        num_fewshot=None,
        chat=False,
    )
    for module, options, code in (("platform", [], 0), ("timeit", ["--nonsense"], 2)):
        tool = harnesses.Harness(
            "it",
            module,
            lambda target, tasks, folder, options=options: options,
            lambda target: {},
            lambda folder: [],
        )
        with pytest.raises(OperationError, match=f"exit code {code}"):
            tool.run(given, ["a"], tmp_path)


def test_numbers_of_each_tool_are_read(tmp_path: Path) -> None:
    """In the forms that lm-eval 0.4.13 and inspect-ai 0.3.285 write."""
    numbers = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "x": 3}
    written = {"results": {"a": {**numbers, "em_stderr,none": "N/A"}}}
    (tmp_path / "results_1.json").write_text(
        json.dumps({**written, "n-samples": {"a": {"effective": 4}}})
    )
    said = [(s.metric, s.value, s.stderr, s.samples) for s in harnesses.LM_EVAL.read(tmp_path)]
    assert said == [("acc", 0.5, 0.1, 4), ("f1,strict", 1.0, None, 4)]
    metrics = {"accuracy": {"value": 0.25}, "stderr": {"value": 0.2}}
    log = {
        "status": "success",
        "eval": {"task": "t"},
        "results": {"completed_samples": 8, "scores": [{"name": "exact", "metrics": metrics}]},
    }
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "good.json").write_text(json.dumps(log))
    (folder / "bad.json").write_text(json.dumps({**log, "status": "error"}))
    (score,) = harnesses.INSPECT.read(folder)
    assert (score.task, score.metric, score.value) == ("t", "accuracy", 0.25)
    assert (score.stderr, score.samples) == (0.2, 8)


def test_a_server_of_its_own_answers_and_goes(tmp_path: Path) -> None:
    import httpx

    with evaluation.serving(Settings(home=tmp_path, threads=1)) as (address, api_key):
        assert api_key is None
        models = httpx.get(f"{address}/v1/models").json()["data"]
        assert "weaver-nano" in {model["id"] for model in models}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/v1/models")
    assert list(evaluation.serving(Settings(base_url="http://a:1/", api_key="k")).gen) == [
        ("http://a:1", "k")
    ]


def test_a_server_that_cannot_begin_says_why(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("")
    with (
        pytest.raises((ConfigError, OSError)),
        evaluation.serving(Settings(home=home, threads=1)),
    ):
        pass
