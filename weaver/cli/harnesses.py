"""Other projects' evaluation tools, each in a process of its own, at an OpenAI route.

Called by `weaver checkpoints eval`. What such a tool prints goes to stderr; what it writes lies in
a folder of its own, where its scores are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weaver.config import environment
from weaver.errors import MissingDependencyError, OperationError
from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

SERVICE = "weaver-eval"
"""What inspect-ai calls the server, and, in capitals, the beginning of its variables' names."""


class Score(Value):
    """One number of a task."""

    tool: str
    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is evaluated, and how."""

    address: str
    """Of the server, without a path."""
    api_key: str
    model: str
    """Its name on that server."""
    context_length: int
    tokenizer: Path
    """A folder."""
    concurrency: int
    limit: int | None
    num_fewshot: int | None
    chat: bool

    @property
    def key(self) -> str:
        return self.api_key or "none"


@dataclass(frozen=True, slots=True)
class Harness:
    name: str
    module: str
    command: Callable[[Target, Sequence[str], Path], list[str]]
    """Arguments of the tool for these tasks, with the folder that it writes to."""
    variables: Callable[[Target], Mapping[str, str]]
    read: Callable[[Path], Iterable[Score]]
    """Its scores of that folder."""

    def check(self) -> None:
        """Raises MissingDependencyError."""
        if find_spec(self.module) is None:
            raise MissingDependencyError(
                f"these tasks need {self.name}, which is not installed.",
                hint='Run: pip install "weaver-post-training[eval]"',
            )

    def run(self, target: Target, tasks: Sequence[str], folder: Path) -> list[Score]:
        """Raises OperationError: it failed; what it said is on stderr."""
        command = [sys.executable, "-m", self.module, *self.command(target, tasks, folder)]
        env = {**environment(), **self.variables(target)}
        code = subprocess.run(command, env=env, stdout=sys.stderr, check=False).returncode
        scores = list(self.read(folder)) if code == 0 else []
        if not scores:
            raise OperationError(
                f"{self.name} has no scores (exit code {code}).",
                hint="What it says above tells why.",
            )
        return scores


def harness_of(task: str) -> Harness:
    """inspect-ai for Python files and names with a slash, lm-eval for its names and YAML files."""
    file = task.partition("@")[0]
    inspect = file.endswith(".py") or ("/" in file and not file.endswith((".yaml", ".yml")))
    return INSPECT if inspect else LM_EVAL


# --- lm-eval --------------------------------------------------------------------------------------


def _lm_eval(target: Target, tasks: Sequence[str], folder: Path) -> list[str]:
    model = {
        "model": target.model,
        "base_url": f"{target.address}/v1/completions",
        "tokenizer": str(target.tokenizer),
        "tokenizer_backend": "huggingface",
        "max_length": target.context_length,
        "num_concurrent": target.concurrency,
    }
    given = ["run", "--model", "local-completions", "--model_args", json.dumps(model)]
    given += ["--output_path", str(folder), "--tasks", *tasks]
    given += [] if target.limit is None else ["--limit", str(target.limit)]
    given += [] if target.num_fewshot is None else ["--num_fewshot", str(target.num_fewshot)]
    return given + (["--apply_chat_template"] if target.chat else [])


def _lm_eval_scores(folder: Path) -> Iterator[Score]:
    for file in sorted(folder.rglob("results_*.json")):
        said = json.loads(file.read_text())
        for task, numbers in said["results"].items():
            counted = said.get("n-samples", {}).get(task, {}).get("effective")
            for key, value in numbers.items():
                metric, _, how = key.partition(",")
                if not how or metric.endswith("_stderr") or not _is_number(value):
                    continue
                error = numbers.get(f"{metric}_stderr,{how}")
                yield Score(
                    tool=LM_EVAL.name,
                    task=task,
                    metric=metric if how == "none" else key,
                    value=value,
                    stderr=error if _is_number(error) else None,
                    samples=counted,
                )


LM_EVAL = Harness(
    "lm-eval",
    "lm_eval",
    _lm_eval,
    lambda target: {"OPENAI_API_KEY": target.key, "TOKENIZERS_PARALLELISM": "false"},
    _lm_eval_scores,
)


# --- inspect-ai -----------------------------------------------------------------------------------


def _inspect(target: Target, tasks: Sequence[str], folder: Path) -> list[str]:
    # it knows files by patterns, which are relative
    files = [os.path.relpath(task) if os.path.isabs(task) else task for task in tasks]
    given = ["eval", *files, "--model", f"openai-api/{SERVICE}/{target.model}"]
    given += ["--log-dir", str(folder), "--log-format", "json", "--display", "plain"]
    given += ["--max-connections", str(target.concurrency)]
    return given + ([] if target.limit is None else ["--limit", str(target.limit)])


def _inspect_scores(folder: Path) -> Iterator[Score]:
    for file in sorted(folder.rglob("*.json")):
        said = json.loads(file.read_text())
        if said.get("status") != "success":
            continue
        results = said["results"]
        for scored in results["scores"]:
            metrics = {name: one["value"] for name, one in scored["metrics"].items()}
            error = metrics.pop("stderr", None)
            for metric, value in metrics.items():
                yield Score(
                    tool=INSPECT.name,
                    task=said["eval"]["task"],
                    metric=metric if len(results["scores"]) == 1 else f"{scored['name']}/{metric}",
                    value=value,
                    stderr=error,
                    samples=results["completed_samples"],
                )


def _inspect_variables(target: Target) -> Mapping[str, str]:
    name = SERVICE.upper().replace("-", "_")
    return {f"{name}_BASE_URL": f"{target.address}/v1", f"{name}_API_KEY": target.key}


INSPECT = Harness("inspect-ai", "inspect_ai", _inspect, _inspect_variables, _inspect_scores)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
