"""Every case of the benchmark against peers runs, small and ours alone; its page can be written."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.peers import page, run, shapes
from tests.benchmarks.peers.cases import CASES, Case, Load

if TYPE_CHECKING:
    from pathlib import Path


def smoke(folder: Path, *only: str) -> dict[str, object]:
    out = folder / "results.json"
    run.main(["--smoke", *(["--no-growth", "--only", *only] if only else []), "--out", str(out)])
    results = json.loads(out.read_text())
    assert not [one for one in results["cases"].values() if "error" in one]
    text = page.page([results])
    assert all(name in text for name in results["cases"])
    return dict(results["cases"])


def test_a_case_runs_and_is_not_measured_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = smoke(tmp_path, "^train 2 x 64$")
    assert name in capsys.readouterr().out
    smoke(tmp_path, "^train 2 x 64$")
    assert name not in capsys.readouterr().out


@pytest.mark.slow
def test_every_case_runs(tmp_path: Path) -> None:
    assert len(smoke(tmp_path)) == len(CASES)


@pytest.mark.slow
def test_the_peer_that_is_here_does_the_same(tmp_path: Path) -> None:
    load = Load(kind="train", lengths=(16, 8), rank=4, learned=0.5, tenants=2)
    with run.Pool() as pool:
        folder = shapes.made("nano", tmp_path)
        for one in (load, Load(kind="sample", lengths=(4, 2), rank=4, samples=2)):
            case = Case(name="same", load=one, shape="nano")
            measured = run.measure(case, pool, rounds=1, folder=folder)
            assert [len(each) for each in measured["seconds"]] == [1, 1]
            assert run.summary(case, measured)["ratio"] > 0


@pytest.mark.slow
def test_a_worker_that_fails_is_a_named_failure_of_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Case(name="bad", load=Load(kind="sample", lengths=(4,), rank=10**4), peer=None)
    monkeypatch.setattr(run, "CASES", (bad,))
    out = tmp_path / "results.json"
    monkeypatch.setattr(Load, "smaller", lambda self: self)
    run.main(["--smoke", "--no-growth", "--out", str(out)])
    assert "rank" in json.loads(out.read_text())["cases"]["bad"]["error"]


def test_a_peer_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("vllm") is None
    monkeypatch.setattr(run.machine, "machine", lambda: {"device": "a GPU"})
    with pytest.raises(run.WorkerError, match="vllm is not installed"):
        run.python_of("vllm")
