"""`weaver checkpoints eval` with the published `lm-eval` and `inspect-ai`, on tasks of this folder.

`make test-clients` makes the environment (.venv-eval) and runs this. What the tools count is held
against what our own client samples and scores.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weaver import ModelInput, SamplingParams, ServiceClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weaver import SamplingClient

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
TASKS = HERE / "eval_tasks"
ROOT = HERE.parents[1]
PYTHON = ROOT / ".venv-eval" / "bin" / "python"
ROWS = [json.loads(line) for line in (TASKS / "words.jsonl").read_text().splitlines()]
ALL = f"{TASKS / 'write.yaml'},{TASKS / 'choose.yaml'},{TASKS / 'words.py'}"


def evaluate(*arguments: str, env: Mapping[str, str], cwd: Path) -> dict[tuple[str, str], Any]:
    """The scores by task and metric, as printed and as written."""
    (cwd / "words.jsonl").write_text((TASKS / "words.jsonl").read_text())
    out = cwd / "out"
    command = [
        PYTHON,
        "-m",
        "tests.clients.weaver_eval",
        *arguments,
        "--out",
        str(out),
        "-o",
        "json",
    ]
    done = subprocess.run(
        command,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(cwd),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "WEAVER_THREADS": "1",
            **env,
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads(done.stdout)
    assert json.loads((out / "scores.json").read_text())["scores"] == scores
    return {(score["task"], score["metric"]): score for score in scores}


def ours(client: SamplingClient, *, chat: bool = False) -> dict[str, float]:
    """The same, counted by our own client."""
    greedy = SamplingParams(max_tokens=8, temperature=0.0, stop=() if chat else ("\n",))
    tokenizer = client.get_tokenizer()
    written, chosen = 0, 0
    for row in ROWS:
        prompt = [{"role": "user", "content": row["question"]}] if chat else row["question"]
        written += client.sample(prompt, greedy).sequences[0].text == row["answer"]
        asked = tokenizer.encode(row["question"])
        likely = []
        for choice in row["choices"]:
            scored = client.compute_logprobs(
                ModelInput.from_ints([*asked, *tokenizer.encode(choice)])
            )
            likely.append(sum(lp for lp in scored[len(asked) :] if lp is not None))
        chosen += likely.index(max(likely)) == row["label"]
    return {"written": written / len(ROWS), "chosen": chosen / len(ROWS)}


def check(scores: dict[tuple[str, str], Any], client: SamplingClient) -> None:
    want = ours(client)
    assert scores["weaver_write", "exact_match"]["value"] == want["written"]
    assert 0 < want["written"]
    assert scores["weaver_choose", "acc"]["value"] == want["chosen"] > 0.5
    said = scores["reversed_words", "mean"]
    assert (said["value"], said["samples"]) == (ours(client, chat=True)["written"], len(ROWS))
    assert {score["tool"] for score in scores.values()} == {"lm-eval", "inspect-ai"}


def test_a_checkpoint_of_a_server(server: dict[str, str], tmp_path: Path) -> None:
    with ServiceClient(server["WEAVER_BASE_URL"], server["WEAVER_API_KEY"]) as service:
        trainer = service.create_model("weaver-nano", {"rank": 4})
        path = trainer.save_weights_for_sampler("evaluated").path
        env = {name: server[name] for name in ("WEAVER_BASE_URL", "WEAVER_API_KEY")}
        scores = evaluate(path, "--tasks", ALL, env=env, cwd=tmp_path)
        check(scores, service.create_sampling_client(path))


def test_a_checkpoint_of_this_machine_without_a_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with ServiceClient(home=home) as service:
        service.create_model("weaver-nano", {"rank": 4}).save_state("here")
    env = {"WEAVER_HOME": str(home)}
    scores = evaluate("here", "--tasks", ALL, "--limit", "4", env=env, cwd=tmp_path)
    assert {score["samples"] for score in scores.values()} == {4}
