"""The self-test: every proof runs, failures and errors show, the page is there from the start."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from weaver.errors import EngineError
from weaver_rl import cli
from weaver_rl.proofs import PROOFS, Outcome, Proof

if TYPE_CHECKING:
    from pathlib import Path

    from weaver import AsyncServiceClient


async def passes(service: AsyncServiceClient, seed: int) -> Outcome:
    return Outcome(value=0.9 + seed / 100, passed=True, curve=(0.1, 0.9))


async def fails(service: AsyncServiceClient, seed: int) -> Outcome:
    return Outcome(value=0.5, passed=False, note="<b>too low</b>")


async def breaks(service: AsyncServiceClient, seed: int) -> Outcome:
    raise EngineError("no memory.")


def proof(name: str, run: Any, *seeds: int) -> Proof:
    return Proof(name=name, claim=f"{name} learns", gate="≥ 0.9", run=run, seeds=seeds or (0,))


def page_data(page: Path) -> dict[str, Any]:
    block = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert block is not None
    data: dict[str, Any] = json.loads(block[1])
    return data


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))


def test_all_results_are_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proofs = (proof("good", passes, 0, 1), proof("bad", fails), proof("broken", breaks))
    monkeypatch.setattr(cli, "PROOFS", proofs)
    page = tmp_path / "page.html"
    assert cli.selftest(["--page", str(page)]) == 1
    data = page_data(page)
    assert dict(data["tiles"])["Runs"] == "4 of 4"
    assert (dict(data["tiles"])["Passed"], dict(data["tiles"])["Failed"]) == ("2", "2")
    good, bad, broken = data["proofs"]
    assert [run["value"] for run in good["runs"]] == [0.9, 0.91]
    assert bad["runs"][0]["note"] == "<b>too low</b>"
    assert "<b>" not in page.read_text()
    assert (broken["runs"][0]["value"], broken["runs"][0]["note"]) == (None, "no memory.")
    said = capsys.readouterr().out
    assert "FAILED  broken, seed 0" in said
    assert "2 of 4 passed" in said


def test_one_by_name_and_one_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "PROOFS", (proof("good", passes, 3, 4), proof("bad", fails)))
    page = tmp_path / "page.html"
    assert cli.selftest(["good", "--quick", "--page", str(page)]) == 0
    (good,) = page_data(page)["proofs"]
    assert [run["seed"] for run in good["runs"]] == [3]


def test_wrong_names_and_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.selftest(["rejection"])
    assert ended.value.code == 2
    assert "Did you mean 'rejection sampling'?" in capsys.readouterr().err
    assert cli.selftest(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PROOFS)


def test_every_claim_of_the_table_has_its_proof() -> None:
    names = {one.name for one in PROOFS}
    assert names >= {
        "importance sampling", "ppo", "cispo", "gspo", "standardised", "leave one out",
        "rejection sampling", "supervised", "number guessing", "staleness 8",
    }  # fmt: skip
    controls = {one.name for one in PROOFS if one.control}
    assert controls >= {
        "random reward", "flipped advantage", "zero learning rate", "dealt rewards",
        "dealt rewards, cispo", "dealt rewards, gspo", "swapped pairs by dpo",
    }  # fmt: skip
    assert len(next(one for one in PROOFS if one.name == "importance sampling").seeds) == 5
