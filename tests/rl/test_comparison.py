"""Comparisons: the table keeps to 80 columns, the page runs nothing, broken folders are named."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest

from tests.rl.test_report import EVIL, Page
from weaver.errors import ConfigError, NotFoundError
from weaver_rl.cli import main
from weaver_rl.comparison import compare, distinct_labels
from weaver_rl.run_folder import open_run_folder
from weaver_rl.storage import append_line, write_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def make_run(path: Path, rewards: Sequence[float | None], **config: object) -> Path:
    folder = open_run_folder(path, {"model": "weaver-nano", **config})
    for step, reward in enumerate(rewards, start=1):
        row = {} if reward is None else {"reward/mean": reward, "reward/max": 1.0}
        append_line(folder.metrics, {"step": step, "time": 1e9 + step, "time/step_s": 0.5, **row})
    return path


def test_values_and_differences(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", [0.1, 0.9, 0.5, None], objective={"loss_fn": "ppo"})
    second = make_run(tmp_path / "b", [0.2, 0.3], objective={"loss_fn": "gspo"}, seed=1)
    found = compare([first, second, first], window=2)
    assert [one.label for one in found.runs] == ["a", "b"]
    a, b = found.values["reward/mean"]
    assert (a.last, a.best, a.best_step, a.mean_of_last) == (0.5, 0.9, 2, pytest.approx(0.7))
    assert a.difference is None
    assert (b.last, b.difference) == (0.3, pytest.approx(0.25 - 0.7))
    assert set(found.values) == {"reward/mean", "time/step_s"}
    assert found.values["time/step_s"][0].best is None
    assert found.config == {
        "objective.loss_fn": {"ppo": ("a",), "gspo": ("b",)},
        "seed": {"–": ("a",), "1": ("b",)},
    }
    assert list(compare([first, second], metrics=["reward/max"]).values) == ["reward/max"]
    with pytest.raises(ConfigError, match="reward/max"):
        compare([first, second], metrics=["reward/maximum"])
    with pytest.raises(ConfigError, match="window"):
        compare([first], window=0)


def test_the_table_keeps_to_80_columns(tmp_path: Path) -> None:
    for i in range(12):
        value = 10.0 ** (i - 6) * (-1) ** i
        make_run(tmp_path / f"{'long-name-' * 6}{i}", [value, value], note="x" * 300 + str(i))
    lines = str(compare(sorted(tmp_path.iterdir()))).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("long-name-" in line for line in lines) >= 24
    assert any("note" in line for line in lines)


def test_a_golden_table(tmp_path: Path) -> None:
    make_run(tmp_path / "ppo", [0.25, 0.75, 0.5], objective={"loss_fn": "ppo"})
    make_run(tmp_path / "gspo", [0.25, 1.0], objective={"loss_fn": "gspo"})
    found = compare([tmp_path / "ppo", tmp_path / "gspo"], metrics=["reward/mean"], window=2)
    assert str(found).splitlines() == [
        "reward/mean                      last      best  at step  mean of 2  difference",
        "  ppo                           0.500     0.750        2      0.625",
        "  gspo                          1.000     1.000        2      0.625      +0.000",
        "",
        "What differs in the configuration",
        "  objective.loss_fn",
        "    ppo: ppo",
        "    gspo: gspo",
    ]


def test_what_a_folder_holds_cannot_run(tmp_path: Path) -> None:
    first = make_run(tmp_path / "<b>a", [0.1], note=EVIL)
    second = make_run(tmp_path / "\x1b[31mb", [0.2], **{EVIL: 1})
    found = compare([first, second, tmp_path / EVIL.replace("/", "")])
    assert "\x1b" not in str(found)
    text = found.write_page(tmp_path / "page.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert not {"img", "b"} & set(tags)
    assert not [attrs for _, attrs in page.elements if "src" in attrs]
    assert [run["label"] for run in page.data["runs"]] == ["<b>a", "\x1b[31mb"]
    assert page.data["runs"][0]["metrics"]["reward/mean"] == [0.1]
    assert [name for name, _ in page.data["config"]] == ["note", EVIL]


def test_folders_without_a_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = make_run(tmp_path / "good", [0.5])
    make_run(tmp_path / "empty", [])
    (tmp_path / "nothing").mkdir()
    broken = make_run(tmp_path / "broken", [0.5])
    (broken / "config.json").write_text("{")
    foreign = make_run(tmp_path / "foreign", [0.5])
    write_lines(foreign / "metrics.jsonl", [{"step": 1}, ["a"]])
    listed = make_run(tmp_path / "listed", [0.5])
    (listed / "config.json").write_text("[]")
    names = ["good", "empty", "nothing", "broken", "foreign", "listed", "gone"]
    assert main(["compare", *names, "-o", "json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in said["runs"]] == ["good"]
    assert said["page"] == str(tmp_path / "comparison.html")
    for name, words in {
        "empty": "no step yet",
        "nothing": "no config.json",
        "broken": "not JSON",
        "foreign": "entry 2 has no step",
        "listed": "no object",
        "gone": "no such folder",
    }.items():
        assert words in said["left_out"][name]
    assert main(["compare", str(good)]) == 0
    assert "reward/mean" in capsys.readouterr().out
    assert main(["compare", *names[1:]]) == 1
    err = capsys.readouterr().err
    assert all(name in err for name in names[1:])
    with pytest.raises(NotFoundError, match="none is given"):
        compare([])


def test_what_is_no_number_is_no_value(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", [0.5, 0.75])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean": NaN}\n{"step": 4, "reward/mean": "x"}\n')
        file.write('{"step": 5, "reward/me')  # torn by a kill
    (one,) = compare([path]).values["reward/mean"]
    assert math.isclose(one.last, 0.75)
    data = Page(compare([path]).write_page(tmp_path / "p.html").read_text()).data
    assert data["runs"][0]["metrics"]["reward/mean"] == [0.5, 0.75, None, None]


def test_labels_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert list(distinct_labels(paths).values()) == ["x/run", "y/run"]
    assert list(distinct_labels([tmp_path / "a", tmp_path / "b"]).values()) == ["a", "b"]
