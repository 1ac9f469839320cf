"""Every case of the benchmark against peers runs, small and ours alone; its page can be written."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.benchmarks import figures
from tests.benchmarks.figures import Figure
from tests.benchmarks.peers import machine, page, run, shapes
from tests.benchmarks.peers.cases import CASES, ON_CUDA, Case, Load

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
def test_every_case_of_a_gpu_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, page):
        monkeypatch.setattr(module, "cases_of", lambda device: ON_CUDA)
    assert len(smoke(tmp_path, ".")) == len(ON_CUDA)


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
def test_a_side_that_fails_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Load(kind="sample", lengths=(4,), rank=4)
    bad = replace(good, rank=10**4)
    cases = (
        Case(name="ours", load=bad, peer=None),
        Case(name="theirs", load=good, peer="weaver", against=bad),
        Case(name="none", load=good, peer="weaver"),
    )
    for module in (run, page):
        monkeypatch.setattr(module, "cases_of", lambda device: cases)
    monkeypatch.setattr(Load, "smaller", lambda self: self)
    out = tmp_path / "results.json"
    run.main(["--smoke", "--no-growth", "--out", str(out)])
    results = json.loads(out.read_text())
    ours, theirs, none = results["cases"].values()
    assert "rank" in ours["error"]
    assert "rank" in theirs["peer_error"]
    assert len(theirs["median_s"]) == 1
    assert len(none["median_s"]) == 2
    assert "| ours | | | |  | not measured: " in page.page([results])


def test_a_worker_that_hangs_or_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DEADLINE_S", 1.0)
    load = Load(kind="sample", lengths=(4,))
    for script, message in (("sleep 60", "no answer within 1 s"), ("echo why >&2", "ended: why")):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        worker = run.Worker("peft", tmp_path, tmp_path, str(program))
        with pytest.raises(run.WorkerError, match=message):
            worker.round(load)
        worker.end()


def test_memory_is_that_of_the_worker_itself(tmp_path: Path) -> None:
    """Linux begins the `ru_maxrss` of a process with what its parent had."""
    held = b"x" * 700_000_000
    folder = shapes.made("nano", tmp_path)
    load = Load(kind="train", lengths=(8,), rank=4)
    worker = run.Worker("weaver", folder, tmp_path, run.python_of("weaver"))
    try:
        assert worker.round(load)["peak_bytes"] < len(held)
    finally:
        worker.end()


def test_a_goal_is_judged_by_what_was_measured() -> None:
    load = Load(kind="train", lengths=(100,))
    case = Case(name="x", load=load, ratio=2.0, share=0.5)
    measured: dict[str, Any] = {"seconds": [[1.0, 1.0], [2.0, 4.0]], "peak_bytes": [1, 1]}
    measured |= run.summary(case, measured)
    assert measured["ratio"] == 3.0
    assert "| reached |" in page._row(case, measured, {"train_tokens_per_s": 199.0})
    assert "| **missed** |" in page._row(case, measured, {"train_tokens_per_s": 201.0})


def test_the_limits_of_the_machine_are_measured() -> None:
    found = machine.limits("nano")
    assert {"2048 x 64 x 192, float32", "1 x 64 x 32000, float32"} <= found["gemm_gflops"].keys()
    assert min(min(speeds.values()) for speeds in found["gemm_gflops"].values()) > 0
    assert found["train_tokens_per_s"] > 0
    assert found["decode_tokens_per_s"] > 0


def test_notes_of_the_page_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "benchmarks.md")
    figure = Figure("close()", (3.0,), "ms", at_most=2).as_json()
    service = {"machine": figures.machine(), "benchmarks": {"client": [figure]}}
    (tmp_path / "service.json").write_text(json.dumps(service))
    page.main([str(tmp_path / "service.json")])
    with page.PAGE.open("a") as file:
        file.write("\nWritten by hand.\n")
    page.main([str(tmp_path / "service.json")])
    text = page.PAGE.read_text()
    assert text.endswith("## Notes\n\nWritten by hand.\n")
    assert "| client: close() | 3 ms | at most 2 | **missed** |" in text


def test_a_peer_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("vllm") is None
    monkeypatch.setattr(run.machine, "machine", lambda: {"device": "a GPU"})
    with pytest.raises(run.WorkerError, match="vllm is not installed"):
        run.python_of("vllm")
