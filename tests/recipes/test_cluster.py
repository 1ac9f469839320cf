"""The demo on a cluster: two ranks train, and what comes of each step is what one process has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("ray")

from recipes import demo
from recipes._cluster import served
from tests.recipes.test_server import WALL
from weaver.errors import ConfigError
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from weaver import TrainingClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def steps_of(flags: demo.Flags, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each step of both parts told, and who sampled well."""
    losses: list[float] = []
    train = demo.train

    def recorded(trainer: TrainingClient, *rest: Any) -> list[float]:
        losses.extend(train(trainer, *rest))
        return losses

    before = {*Path("runs").glob("demo-*")}
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", recorded)
        demo.main(flags)
    [folder] = {*Path("runs").glob("demo-*")} - before
    rows = [
        {name: value for name, value in row.items() if not name.startswith(WALL)}
        for row in read_lines(folder / "metrics.jsonl")
    ]
    return [*({"loss": loss} for loss in losses), *rows]


def test_each_step_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    flags = demo.Flags(steps=20, rl_steps=6)
    alone = steps_of(flags, monkeypatch)
    ranks = steps_of(demo.Flags(steps=20, rl_steps=6, cluster=True), monkeypatch)
    assert len(ranks) == len(alone) >= 26
    for ours, theirs in zip(ranks, alone, strict=True):
        for row in (ours, theirs):  # a sum over hundreds of tokens is as exact as its mean
            if "train/loss_sum" in row:
                row["train/loss_sum"] /= row["train/weight_sum"]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_server_that_does_not_start_is_named() -> None:
    with pytest.raises(ConfigError, match="the server does not start"), served("/no/such/model"):
        pass
