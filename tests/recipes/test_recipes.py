"""What every recipe of a loop does alike: dry, short, resumed, and in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from recipes import distillation, importance_sampling, preference, rejection_sampling, sft
from tests.rl.test_trackers import settled_history, wandb_files, wandb_records
from weaver.errors import (
    ConfigError,
    ConflictError,
    ContextLengthError,
    InvalidParamsError,
    InvalidRequestError,
)
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from types import ModuleType

FEW = {"held_out": 8, "groups_per_step": 4, "group_size": 4}
SMALL: dict[ModuleType, dict[str, Any]] = {
    sft: {"held_out": 8, "batch_tokens": 512},
    rejection_sampling: FEW,
    importance_sampling: FEW,
}
BOUNDS = {
    sft: ("train/loss", 0, 20),
    rejection_sampling: ("rejection/accept_rate", 0, 1),
    importance_sampling: ("gap/max", 0, 1e-4),
}
"""Between which values a metric of each must lie, at every step."""
RECIPES = pytest.mark.parametrize("recipe", SMALL, ids=lambda module: module.__name__[8:])


def short(recipe: ModuleType, out: str, **flags: Any) -> list[dict[str, Any]]:
    """What a run of a few small steps leaves in its metrics.jsonl, but for the first evaluation."""
    recipe.main(recipe.Flags(out=Path(out), **{**SMALL[recipe], "steps": 2, **flags}))
    first, *rows = read_lines(Path(out, "metrics.jsonl"))
    assert first["step"] == 0 <= first["eval/mean"]
    return rows


@RECIPES
def test_a_dry_run_scores_four_replies_and_writes_nothing(
    recipe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = recipe.main(recipe.Flags(dry_run=True))
    assert 0 <= metrics["eval/mean"] <= 1
    assert capsys.readouterr().out.count("→") == 4
    assert not Path("runs").exists()


@RECIPES
def test_a_dry_run_refuses_what_a_run_would(recipe: ModuleType) -> None:
    Path("tasks.jsonl").write_text('{"prompt": "rev:ab="}\n')
    with pytest.raises(InvalidRequestError, match=r"tasks\.jsonl\[0\]: has .*(answer|completion)"):
        recipe.main(recipe.Flags(dry_run=True, tasks="tasks.jsonl", held_out=0))
    with pytest.raises(ConfigError, match="--out"):
        recipe.main(recipe.Flags(dry_run=True, resume=True))
    if recipe is sft:
        long = {"prompt": "English: x", "answer": "x" * 2000}
        Path("tasks.jsonl").write_text(f"{json.dumps(long)}\n")
        for dry in (True, False):
            with pytest.raises(ContextLengthError, match=r"tasks\.jsonl\[0\].* context is 1024"):
                sft.main(sft.Flags(dry_run=dry, tasks="tasks.jsonl", held_out=0, out=Path("no")))
    for wrong in ({"rank": 0}, {"learning_rate": -1.0}):
        with pytest.raises(InvalidParamsError, match=next(iter(wrong))):
            recipe.main(recipe.Flags(dry_run=True, **wrong))


@RECIPES
def test_a_short_run_leaves_its_report_and_goes_on(
    recipe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    short(recipe, "run")
    with pytest.raises(ConflictError):
        short(recipe, "run")
    rows = short(recipe, "run", steps=3, resume=True)
    assert [row["step"] for row in rows] == [1, 2, 3]
    metric, low, high = BOUNDS[recipe]
    assert all(low <= row[metric] <= high for row in rows)
    said = capsys.readouterr().out
    assert "Report: run/report.html" in said
    assert "Held out, greedy: " in said
    assert short(recipe, "run", steps=3, resume=True) == rows
    again = capsys.readouterr().out
    assert again.startswith("run is finished (3 steps, eval/mean ") and again.count("\n") == 1
    assert Path("run/report.html").stat().st_size > 10_000


CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "no" * i}]}
    for i in range(1, 25)
]


def write_rows(*rows: object) -> str:
    Path("chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return "chat.jsonl"


def test_chats_are_fine_tuned_on(capsys: pytest.CaptureFixture[str]) -> None:
    flags = sft.Flags(tasks=write_rows(*CHATS), out=Path("run"), held_out=4, steps=12, epochs=9)
    assert "eval/mean" not in sft.main(flags)
    first, *_, last = read_lines(Path("run", "metrics.jsonl"))
    assert last["eval/loss"] < first["eval/loss"]
    assert "Held out: a loss of " in capsys.readouterr().out
    sft.main(sft.Flags(tasks="chat.jsonl", held_out=4, dry_run=True))
    assert "20 examples for weaver-nano are sound" in capsys.readouterr().out


def test_a_broken_chat_is_named_by_its_row_in_the_file() -> None:
    tasks = write_rows(*CHATS, {"messages": [{"role": "user"}]})
    for dry in (True, False):
        with pytest.raises(InvalidRequestError, match=r"chat\.jsonl\[24\]\.messages\[0\]\.content"):
            sft.main(sft.Flags(tasks=tasks, held_out=4, dry_run=dry, out=Path("no")))


def test_a_chat_with_an_answer_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": chat["messages"][:1], "answer": "no"} for chat in CHATS]
    metrics = sft.main(sft.Flags(tasks=write_rows(*rows), held_out=4, dry_run=True))
    assert 0 <= metrics["eval/mean"] <= 1


def test_chats_that_are_too_long_are_counted() -> None:
    flags = {"tasks": write_rows(*CHATS), "max_length": 40, "held_out": 4, "dry_run": True}
    with pytest.raises(
        InvalidRequestError, match=r"chat\.jsonl\[\d+\]: has 4\d tokens, more than 40"
    ):
        sft.main(sft.Flags(**flags))
    cut, dropped = (sft.main(sft.Flags(**flags, too_long=how)) for how in ("cut", "drop"))
    assert (cut["data/cut"], cut["data/dropped"]) == (dropped["data/dropped"], 0)
    assert 0 < dropped["data/dropped"] < 20


def test_wandb_has_what_metrics_jsonl_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    kept = short(importance_sampling, "run", wandb_project="reverse")
    (file,) = wandb_files(Path("run"))
    for row, logged in zip(kept, settled_history(file, 3)[1:], strict=True):
        assert logged["_step"] == row.pop("step")
        del row["time"]
        assert len(row) > 20
        assert {name: logged[name] for name in row} == row
    (run,) = (r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run")
    assert (run.display_name, run.run_group) == ("run", "importance-sampling")
    assert list(run.tags) == ["weaver-nano", "importance-sampling"]


def test_sampling_may_run_ahead() -> None:
    rows = short(importance_sampling, "run", steps=3, max_staleness=1, correction="ratio")
    assert [row["staleness/max"] for row in rows] == [0, 1, 1]
    with pytest.raises(ConfigError, match="correction"):
        importance_sampling.main(importance_sampling.Flags(dry_run=True, max_staleness=1))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("recipe", "gate"),
    [(sft, 0.85), (rejection_sampling, 0.97), (importance_sampling, 0.95)],
    ids=["sft", "rejection_sampling", "importance_sampling"],
)
def test_it_learns(recipe: ModuleType, gate: float) -> None:
    assert recipe.main(recipe.Flags())["eval/mean"] >= gate


def test_pairs_are_learned_from(capsys: pytest.CaptureFixture[str]) -> None:
    flags = preference.Flags(out=Path("run"), held_out=40, steps=3, batch_size=8)
    preference.main(flags)
    first, *rows = read_lines(Path("run", "metrics.jsonl"))
    assert first["eval/accuracy"] == 0.5
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
    said = capsys.readouterr().out
    assert "Held-out pairs: " in said and "Report: run/report.html" in said


def test_a_dry_run_of_pairs_names_the_broken_row(capsys: pytest.CaptureFixture[str]) -> None:
    preference.main(preference.Flags(dry_run=True))
    assert "1000 pairs for weaver-nano are sound" in capsys.readouterr().out
    tasks = write_rows(*preference.PAIRS[:9], {"prompt": "a", "chosen": "b"})
    for dry in (True, False):
        with pytest.raises(InvalidRequestError, match=r"chat\.jsonl\[9\]\.rejected"):
            preference.main(preference.Flags(tasks=tasks, held_out=0, dry_run=dry, out=Path("no")))


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_teacher_is_learned_from(lmbda: float, capsys: pytest.CaptureFixture[str]) -> None:
    flags = distillation.Flags(out=Path("run"), held_out=8, steps=3, batch_size=8, lmbda=lmbda)
    distillation.main(flags)
    first, *rows = read_lines(Path("run", "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert 0 < rows[2]["eval/loss"] < first["eval/loss"]
    assert rows[0]["distil/on_policy_fraction"] == lmbda
    said = capsys.readouterr().out
    assert "Of held-out tokens " in said and "Report: run/report.html" in said
    with pytest.raises(ConflictError):
        distillation.main(flags)


def test_a_dry_run_of_distillation_names_the_broken_row(capsys: pytest.CaptureFixture[str]) -> None:
    distillation.main(distillation.Flags(dry_run=True))
    assert "1000 rows for weaver-nano and weaver-nano are sound" in capsys.readouterr().out
    tasks = write_rows(*distillation.ROWS[:9], {"completion": "a"})
    for dry in (True, False):
        flags = {"tasks": tasks, "held_out": 0, "dry_run": dry, "out": Path("no")}
        with pytest.raises(InvalidRequestError, match=r"chat\.jsonl\[9\]\.prompt"):
            distillation.main(distillation.Flags(**flags))
    with pytest.raises(ConfigError, match=r"^beta"):
        distillation.main(distillation.Flags(dry_run=True, beta=2.0))
