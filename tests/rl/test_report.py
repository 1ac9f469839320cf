"""The report: the whole run is in it, it loads nothing, and what a model wrote cannot run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.rl.helpers import group
from weaver.errors import NotFoundError
from weaver_rl.credit.marks import spread
from weaver_rl.datums import examples
from weaver_rl.objectives import Behaviour
from weaver_rl.report import json_block, report_data, thinned, write_report
from weaver_rl.run_folder import RunFolder, open_run_folder
from weaver_rl.storage import append_line
from weaver_rl.transcripts import write_transcripts

if TYPE_CHECKING:
    from collections.abc import Sequence

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>@@DATA@@\u2028&lt;"


class Page(HTMLParser):
    """Collects elements, attributes and the contents of scripts, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.scripts[0])
        return content


def decode(tokens: Sequence[int]) -> str:
    return "".join(EVIL if token == 3 else chr(97 + token) for token in tokens)


def make_run(path: Path, *, steps: int = 3) -> RunFolder:
    folder = open_run_folder(path, {"model": EVIL, "objective": {"loss_fn": "ppo"}})
    groups = [group(1.0, 0.0), group(1.0, 1.0), group(0.0, 0.0), group(None, 0.5), group(None)]
    groups[0] = replace(
        groups[0], rollouts=tuple(replace(r, task={"prompt": EVIL}) for r in groups[0].rollouts)
    )
    advantages_P_G = np.array([[0.5, -0.5], [0, 0], [0, 0], [0, 0], [0, 0]])
    marks = spread(groups, advantages_P_G)
    one = np.array([0.25, 0.5])
    marks[0][0] = replace(marks[0][0], parts={EVIL: one}, measured={"kl/reference": one})
    made = examples(groups, marks, behaviour=Behaviour(True, 1.0), aggregate="token")
    for step in range(1, steps + 1):
        gap = 0.01 if step == 2 else 1e-6
        row = {"reward/mean": step / 10, "gap/max": gap, EVIL: float(step)}
        append_line(folder.metrics, {"step": step, "time": 1e9 + step, **row})
        write_transcripts(
            folder.transcripts,
            step,
            groups=groups,
            marks=marks,
            trained=[(one, one.q + 0.001) for one in made],
            decode=decode,
        )
    return folder


def test_the_run_is_in_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "reverse")
    path = write_report(folder)
    assert path == folder.report
    data = Page(path.read_text()).data
    assert data["steps"] == [1, 2, 3]
    assert data["metrics"]["reward/mean"] == [0.1, 0.2, 0.3]
    assert data["config"] == [["model", EVIL], ["objective.loss_fn", "ppo"]]
    assert [hint["steps"] for hint in data["hints"]] == ["Step 2"]
    groups = data["samples"]["2"]
    assert [(one["label"], one["mean"]) for one in groups] == [
        ("Best group", 1.0), ("Worst group", None), ("Second best", 0.5), ("Second worst", 0.0)
    ]  # fmt: skip
    best = groups[2]["rollouts"][0]
    assert (best["reward"], best["advantage"]) == (1.0, 0.5)
    segment = best["segments"][0]
    assert segment["pieces"] == ["b", "c", EVIL, "e"]
    assert (segment["advantages"], segment["versions"]) == ([0, 0, 0.5, 0.5], [-1, -1, 0, 0])
    assert segment["gaps"] == [0, 0, 0.001, 0.001]
    assert segment["credit"] == {EVIL: [0, 0, 0.25, 0.5], "kl/reference": [0, 0, 0.25, 0.5]}
    assert segment["sampling_logprobs"] != segment["logprobs"]


def test_what_a_model_wrote_cannot_run(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "<b>run")).read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert "b" not in tags
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    policy = next(
        attrs["content"]
        for tag, attrs in page.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_script_makes_no_html_of_text() -> None:
    for file in (Path(__file__).parents[2] / "weaver_rl/templates").glob("*.js"):
        made = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", file.read_text()
        )
        assert made is None, file.name


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)).read_text())
    assert not [attrs for _, attrs in page.elements if "src" in attrs]
    assert {attrs.get("href") for _, attrs in page.elements} <= {None, "#main"}


@pytest.mark.parametrize("character", "<>&\u2028\u2029")
def test_json_in_a_script_has_no_such_character(character: str) -> None:
    block = json_block({"a": f"x{character}y"})
    assert character not in block
    assert json.loads(block) == {"a": f"x{character}y"}


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    data = report_data(open_run_folder(tmp_path, {"model": "weaver-nano"}))
    assert (data["steps"], data["samples"], data["last_step"]) == ([], {}, 0)
    with pytest.raises(NotFoundError, match="holds no run"):
        write_report(RunFolder(tmp_path / "none"))


def test_long_runs_are_thinned_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weaver_rl.report.MAX_POINTS", 5)
    monkeypatch.setattr("weaver_rl.report.MAX_STEPS", 3)
    data = report_data(make_run(tmp_path, steps=20))
    assert data["steps"] == [1, 6, 11, 15, 20]
    assert set(data["samples"]) == {1, 11, 20}
    assert "5 of 20 steps" in data["footer"]
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
