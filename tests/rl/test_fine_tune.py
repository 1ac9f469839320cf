"""`rl.fine_tune`, and what blocking calls share: a plan for arguments, a judge by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import weaver_rl as rl
from weaver.errors import ConfigError, ConflictError, InvalidRequestError
from weaver.types import SamplingParams
from weaver_rl.storage import read_lines
from weaver_rl.tasks.words import exact, reverse_tasks

if TYPE_CHECKING:
    from pathlib import Path

TASKS = reverse_tasks(48)
EXAMPLES = [{"prompt": one["prompt"], "completion": one["answer"]} for one in TASKS]
SHORT = SamplingParams(max_tokens=10)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_lines(folder / "metrics.jsonl")]


def test_it_learns_and_goes_on_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"epochs": 4, "batch_tokens": 128, "held_out": EXAMPLES[40:]}
    more |= {"learning_rate": 2e-3, "evaluate_every": 0, "checkpoint_every": 2}
    whole = rl.fine_tune("weaver-nano", EXAMPLES[:40], steps=6, folder=tmp_path / "1", **more)
    said = capsys.readouterr().out
    assert "step 6/6" in said and "s a step, 0 s left" in said
    assert whole.report == tmp_path / "1" / "report.html"
    assert whole.weights.startswith("weaver://")
    assert whole.metrics["eval/loss"] > 0
    for steps in (3, 6):
        done = rl.fine_tune(
            "weaver-nano",
            EXAMPLES[:40],
            steps=steps,
            folder=tmp_path / "2",
            resume=True,
            display=False,
            **more,
        )
    last = dict(losses(tmp_path / "1"))
    assert dict(losses(tmp_path / "2"))[6] == last[6] < last[1]
    assert done.metrics["eval/loss"] == whole.metrics["eval/loss"]
    with pytest.raises(ConflictError, match="resume=True"):
        rl.fine_tune("weaver-nano", EXAMPLES[:40], steps=6, folder=tmp_path / "1", **more)


def test_a_plan_in_place_of_arguments(tmp_path: Path) -> None:
    plan = rl.SupervisedPlan(steps=1, batch_tokens=64, seed=3)
    done = rl.fine_tune("weaver-nano", EXAMPLES, plan=plan, folder=tmp_path, display=False)
    assert done.metrics["train/loss"] > 0
    assert rl.RunFolder(tmp_path).config.read_text().count('"seed": 3') == 1
    with pytest.raises(ConfigError, match="beside a plan") as caught:
        rl.fine_tune("weaver-nano", EXAMPLES, plan=plan, epochs=2)
    assert caught.value.field == "epochs"
    policy = rl.Plan(steps=1, groups_per_step=2, group_size=2, sampling=SHORT, passes=2)
    learned = rl.train("weaver-nano", TASKS, exact, plan=policy, display=False)
    assert learned.metrics["rollout/count"] == 4
    with pytest.raises(ConfigError, match="beside a plan") as caught:
        rl.train("weaver-nano", TASKS, exact, plan=policy, group_size=4)
    assert caught.value.field == "group_size"


@pytest.mark.parametrize(
    ("examples", "more", "words"),
    [
        ([], {}, "examples"),
        ([{"prompt": "a"}], {}, r"examples\[0\]"),
        (EXAMPLES, {"epochs": 0}, "epochs"),
        (EXAMPLES, {"resume": True}, "resume"),
    ],
)
def test_bad_input_is_named(examples: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, InvalidRequestError), match=words):
        rl.fine_tune("weaver-nano", examples, display=False, **more)


def judged(model: str) -> rl.Reward:
    def question(task: rl.Task, reply: rl.Reply) -> str:
        return f"{len(reply.text)}+0="

    return rl.judge(model, question, read=lambda text: float(text.strip().isdigit()))


def test_a_judge_is_named_inside_train(tmp_path: Path) -> None:
    small: dict[str, Any] = {"groups_per_step": 2, "group_size": 2, "display": False}
    reward = rl.weighted({judged("weaver-nano"): 1.0, exact: 0.5})
    for environment in (None, rl.single_turn(reward)):
        done = rl.train(
            "weaver-nano",
            TASKS,
            None if environment else reward,
            environment=environment,
            steps=1,
            sampling=SHORT,
            held_out=TASKS[:2],
            folder=None,
            **small,
        )
        assert done.metrics["score/judged"] > 0
        assert done.metrics["eval/failed"] == 0
    with pytest.raises(rl.RolloutsFailedError, match="weaver-nono"):
        rl.train("weaver-nano", TASKS, judged("weaver-nono"), steps=1, sampling=SHORT, **small)
