"""Trackers: what goes in can be read back, names are handed through, and best values are kept."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.rl.helpers import group
from weaver.errors import ConfigError, MissingDependencyError
from weaver_rl.algorithms.run import open_run, sweep_of
from weaver_rl.loggers import SAMPLE_COLUMNS, JsonlLogger, Loggers, TensorBoardLogger, sample_rows
from weaver_rl.storage import read_lines
from weaver_rl.trackers import MlflowLogger, Tracking, TrackioLogger, WandbLogger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GROUPS = [group(1.0, 0.0, None), group(0.5, 0.25)]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes.

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
            yield record


def wandb_history(file: Path) -> Iterator[dict[str, object]]:
    for record in wandb_records(file):
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
    asked = Tracking("reverse", name="r-0", group="ppo", tags=("lora", "s0"), entity="lab")
    wandb = asked.open(config={"path": tmp_path, "lr": 1e-3}, folder=tmp_path)
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
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert logged == [{name: row[name] for name in row if name != "time"} for row in lines]
    assert len(logged) == 3
    records = list(wandb_records(file))
    (run,) = (one.run for one in records if one.WhichOneof("record_type") == "run")
    assert (run.display_name, run.run_group, run.entity) == ("r-0", "ppo", "lab")
    assert list(run.tags) == ["lora", "s0"]
    metrics = [one.metric for one in records if one.WhichOneof("record_type") == "metric"]
    kept = {one.name: (one.summary.max, one.summary.min, one.summary.last) for one in metrics}
    assert kept["reward/mean"] == kept["eval/mean"] == (True, False, True)
    assert kept["eval/loss"] == (False, True, True)
    (table, *_) = sorted(file.parent.glob("files/media/table/samples_1_*.table.json"))
    content = json.loads(table.read_bytes())
    assert content["columns"] == list(SAMPLE_COLUMNS)
    assert content["data"] == [list(row) for row in sample_rows(GROUPS, 1)]

    # A resume is another process. wandb names folders by the second: it gets a folder of its own.
    code = (
        "import json, sys; from pathlib import Path; from weaver_rl.trackers import WandbLogger\n"
        "state = json.loads(sys.argv[2])\n"
        "logger = WandbLogger('reverse', folder=Path(sys.argv[1]), state=state)\n"
        "assert logger.state() == state; logger.log({'reward/mean': 1.0}, 4); logger.close()"
    )
    given = [str(tmp_path / "resumed"), json.dumps(dict(state["wandb"]))]
    subprocess.run([sys.executable, "-c", code, *given], check=True, capture_output=True)
    (again,) = wandb_files(tmp_path / "resumed")
    assert again.name == file.name
    assert [row["_step"] for row in settled_history(again, 1)] == [4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_without_a_name_has_that_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    asked = Tracking("reverse", to="mlflow", uri=uri)
    asked.open(config={}, folder=tmp_path / "mine").close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("reverse").experiment_id])
    assert run.info.run_name == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    asked = Tracking("reverse", to="mlflow", name="r-0", group="ppo", tags=("lora",), uri=uri)
    config = {"objective": {"loss_fn": "ppo"}, **{f"x{i}": i for i in range(120)}}
    first = asked.open(config=config)
    for step, reward in ((1, 0.5), (2, 0.75), (3, 0.25)):
        first.log({"reward/mean": reward, "eval/pass@4": 1.0}, step)
    first.log_samples(GROUPS, 3)
    state = json.loads(json.dumps(first.state()))
    first.close()
    again = asked.open(config={"objective": "other"}, state=state)
    again.log({"reward/mean": 0.5, "credit/kl/mean": -0.1}, 4)
    again.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("reverse").experiment_id])
    assert (run.info.run_name, run.info.status) == ("r-0", "FINISHED")
    assert (run.data.tags["group"], run.data.tags["lora"]) == ("ppo", "true")
    assert (run.data.params["objective.loss_fn"], len(run.data.params)) == ("ppo", 121)
    points = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(p.step, p.value) for p in points] == [(1, 0.5), (2, 0.75), (3, 0.25), (4, 0.5)]
    assert run.data.metrics["best/reward/mean"] == 0.75
    assert run.data.metrics["eval/pass_4"] == 1.0
    (table,) = (tmp_path / "store").rglob("samples/000003.json")
    assert json.loads(table.read_bytes())["columns"] == list(SAMPLE_COLUMNS)


TRACKIO = """
import json, sys
from weaver_rl.trackers import Tracking
asked = Tracking("reverse", to="trackio", name="r-0", group="ppo", tags=("lora",))
first = asked.open(config={"lr": 1e-3})
for step, reward in ((1, 0.5), (2, 0.75)):
    first.log({"reward/mean": reward}, step)
state = json.loads(json.dumps(first.state()))
first.close()
again = asked.open(config={"lr": 1e-3}, state=state)
again.log({"reward/mean": 0.25}, 3)
again.close()
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("reverse", "r-0")
kept = SQLiteStorage.get_run_config("reverse", "r-0")
print(json.dumps([[[r["step"], r["reward/mean"], r["best/reward/mean"]] for r in rows], kept]))
"""


def test_trackio_in_its_own_database(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRACKIO], capture_output=True, text=True, check=True, env=environment
    )
    line, *_ = ran.stdout.splitlines()  # nothing of the package's own while the run goes on
    rows, config = json.loads(line)
    assert rows == [[1, 0.5, 0.5], [2, 0.75, 0.75], [3, 0.25, 0.75]]
    assert (config["lr"], config["tags"], config["_Group"]) == (1e-3, ["lora"], "ppo")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Tracking("p", to="comet"),  # type: ignore[arg-type]
        lambda: Tracking("p", to="trackio", entity="lab"),
        lambda: Tracking("p", uri="http://localhost"),
        lambda: Tracking("p", tags="lora"),  # type: ignore[arg-type]
    ],
)
def test_bad_trackers_are_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="track"):
        wrong()


def test_a_tracker_takes_what_the_run_has_unless_it_is_told_otherwise() -> None:
    asked = Tracking("p", name="mine", group="ours", tags=("seed-0",))
    given: Any = {"name": "words", "group": "sweep", "tags": ("weaver-nano", "x" * 100)}
    assert asked.named(**given) == asked
    filled = Tracking("p").named(**given)
    assert (filled.name, filled.group) == ("words", "sweep")
    assert filled.tags == ("weaver-nano", "x" * 64)


def test_a_run_of_a_sweep_is_of_its_group(tmp_path: Path) -> None:
    below = tmp_path / "rates" / "lr=1"
    below.mkdir(parents=True)
    assert sweep_of(below) is None
    (tmp_path / "rates" / "results.json").touch()
    assert (sweep_of(below), sweep_of(None)) == ("rates", None)


def test_one_tracker_of_a_kind(tmp_path: Path) -> None:
    twice = open_run(tmp_path, {}, tasks=[], steps=1, wandb_project="a", track=[Tracking("b")])
    with pytest.raises(ConfigError, match="track"), twice:
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("wandb", lambda path: WandbLogger("p", folder=path)),
        ("mlflow", lambda path: MlflowLogger("p")),
        ("trackio", lambda path: TrackioLogger("p")),
        ("tensorboard", TensorBoardLogger),
    ],
)
def test_a_missing_package_names_its_extra(
    package: str, make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"weaver-post-training\["):
        make(tmp_path)  # type: ignore[operator]
