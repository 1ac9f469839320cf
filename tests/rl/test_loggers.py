"""Loggers: what goes in can be read back, and one that fails is named and never alone fatal."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tests.rl.helpers import group
from weaver.errors import StorageError
from weaver_rl.loggers import (
    SAMPLE_COLUMNS,
    JsonlLogger,
    Loggers,
    TensorBoardLogger,
    prompt_text,
    sample_rows,
)
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weaver_rl.types import Group

GROUPS = [group(1.0, 0.0, None), group(0.5, 0.25)]


class Recorder:
    def __init__(self, name: str, *, error: Exception | None = None) -> None:
        self.name, self.error, self.calls = name, error, list[str]()

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.error is not None:
            raise self.error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._call("log")

    def log_samples(self, groups: Sequence[Group], step: int) -> None:
        self._call("log_samples")

    def state(self) -> Mapping[str, str]:
        self._call("state")
        return {"id": self.name}

    def close(self) -> None:
        self._call("close")


def use(loggers: Loggers) -> None:
    loggers.log({"reward/mean": 0.5}, 1)
    loggers.log_samples(GROUPS, 1)


def test_one_that_fails_is_named_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Recorder("good"), Recorder("bad", error=ValueError("no network"))
    loggers = Loggers(bad, good)
    with caplog.at_level(logging.WARNING):
        use(loggers)
        assert loggers.state() == {"good": {"id": "good"}}
        loggers.close()
    assert good.calls == bad.calls == ["log", "log_samples", "state", "close"]
    assert loggers.failed == {"bad": 4}
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "'bad' failed" in caplog.text
    assert "no network" in caplog.text


def test_a_full_disk_is_raised_after_all_were_called() -> None:
    full, good = Recorder("full", error=StorageError("disk full.")), Recorder("good")
    with pytest.raises(StorageError, match="disk full"):
        Loggers(full, good).log({}, 1)
    assert good.calls == ["log"]


def test_jsonl(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"reward/mean": 0.1 + 0.2, "gap/max": float("nan")}, 1)
    logger.log_samples(GROUPS, 1)
    logger.close()
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 1.6e9
    assert row == {"step": 1, "reward/mean": 0.1 + 0.2, "gap/max": None}


def test_sample_rows() -> None:
    rows = sample_rows(GROUPS, 4)
    assert [row[3] for row in rows] == [1.0, None, 0.5, 0.25]
    assert rows[1][5] == "reward: ValueError: no"
    assert all(len(row) == len(SAMPLE_COLUMNS) and row[0] == 4 for row in rows)
    assert len(sample_rows(GROUPS * 20, 4)) == 16
    assert sample_rows([], 1) == []
    assert prompt_text({"prompt": [{"role": "user", "content": "hi"}]}) == "user: hi"


def test_tensorboard_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    first = TensorBoardLogger(tmp_path)
    for step in range(1, 5):
        first.log({"reward/mean": step / 4}, step)
    first.log_samples(GROUPS, 4)
    first.close()
    second = TensorBoardLogger(tmp_path, resume_step=2)
    second.log({"reward/mean": 9.0}, 3)
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = [
        (event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("reward/mean")
    ]
    assert points == [(1, 0.25), (2, 0.5), (3, 9.0)]
