"""Loggers: what goes in can be read back, and one that fails is named and never alone fatal."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.rl.helpers import group
from weaver.errors import MissingDependencyError, StorageError
from weaver_rl.loggers import (
    SAMPLE_COLUMNS,
    JsonlLogger,
    Loggers,
    TensorBoardLogger,
    WandbLogger,
    prompt_text,
    sample_rows,
)
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
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


def wandb_history(file: Path) -> Iterator[dict[str, object]]:
    """The history of a .wandb file: LevelDB's log format behind a header of 7 bytes.

    Blocks of 32 KiB hold records of checksum (4), length (2), type (1: whole, 2 to 4: its parts).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def settled_history(file: Path, count: int) -> list[dict[str, object]]:
    """The history once it has `count` rows; wandb writes on for a while when a run has ended."""
    deadline = time.monotonic() + 20
    while len(rows := list(wandb_history(file))) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return rows


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_offline_reads_back_as_metrics_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb = WandbLogger("reverse", config={"path": tmp_path, "lr": 1e-3}, folder=tmp_path)
    loggers = Loggers(JsonlLogger(tmp_path / "metrics.jsonl"), wandb)
    for step in range(1, 4):
        loggers.log({"reward/mean": step / 3, "train/loss": -0.1 * step}, step)
        loggers.log_samples(GROUPS, step)
    state = loggers.state()
    loggers.close()
    assert not loggers.failed

    (file,) = wandb_files(tmp_path)
    logged = [
        {"step": row["_step"], **{name: row[name] for name in ("reward/mean", "train/loss")}}
        for row in settled_history(file, 3)
    ]
    kept = read_lines(tmp_path / "metrics.jsonl")
    assert logged == [{name: row[name] for name in row if name != "time"} for row in kept]
    assert len(logged) == 3
    (table, *_) = sorted(file.parent.glob("files/media/table/samples_1_*.table.json"))
    content = json.loads(table.read_bytes())
    assert content["columns"] == list(SAMPLE_COLUMNS)
    assert content["data"] == [list(row) for row in sample_rows(GROUPS, 1)]

    # A resume is another process. wandb names folders by the second: it gets a folder of its own.
    code = (
        "import json, sys; from pathlib import Path; from weaver_rl.loggers import WandbLogger\n"
        "state = json.loads(sys.argv[2])\n"
        "logger = WandbLogger('reverse', folder=Path(sys.argv[1]), state=state)\n"
        "assert logger.state() == state; logger.log({'reward/mean': 1.0}, 4); logger.close()"
    )
    given = [str(tmp_path / "resumed"), json.dumps(dict(state["wandb"]))]
    subprocess.run([sys.executable, "-c", code, *given], check=True, capture_output=True)
    (again,) = wandb_files(tmp_path / "resumed")
    assert again.name == file.name
    assert [row["_step"] for row in settled_history(again, 1)] == [4]


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


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("wandb", lambda path: WandbLogger("p", folder=path)),
        ("tensorboard.summary.writer.event_file_writer", TensorBoardLogger),
    ],
)
def test_a_missing_package_names_its_extra(
    package: str, make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"weaver-post-training\["):
        make(tmp_path)  # type: ignore[operator]
