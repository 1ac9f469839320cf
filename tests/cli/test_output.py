"""What commands print: tables that break no id at any width, and what programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.cli.test_commands import saved, weaver
from weaver.cli.checkpoints import COLUMNS as CHECKPOINT
from weaver.cli.models import COLUMNS as MODEL
from weaver.cli.output import Format, ago, show
from weaver.cli.runs import RUN, SESSION
from weaver.protocol import SessionState
from weaver.types import CheckpointInfo, LoraConfig, ModelInfo, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.types import Value

__all__ = ["saved"]  # a fixture

NOW = datetime.now(UTC)
RUNS = [
    TrainingRun(
        run_id=f"run-0123456789a{n}",
        name=f"reverse-{n}",
        base_model="Qwen/Qwen3-0.6B-Instruct-2507",
        training_mode="lora",
        lora_config=LoraConfig(rank=8),
        step=120 * n,
        status="active",
        created_at=NOW - timedelta(days=3),
        last_request_at=NOW - timedelta(hours=5 * n),
        user_metadata={"a": "b\tc"},
    )
    for n in (1, 2)
]
CHECKPOINTS = [
    CheckpointInfo(
        path="weaver://run-0123456789a1/sampler/step-000120",
        run_id="run-0123456789a1",
        name="step-000120",
        kind="sampler",
        base_model="weaver-nano",
        training_mode="lora",
        lora_config=LoraConfig(rank=8),
        step=120,
        created_at=NOW - timedelta(hours=4),
        size_bytes=1_250_000,
        expires_at=NOW + timedelta(days=6),
    )
]
MODELS = [
    ModelInfo(
        name="Qwen/Qwen3-0.6B",
        architecture="Qwen3ForCausalLM",
        vocab_size=151_936,
        context_length=40_960,
        num_parameters=596_049_920,
        size_bytes=2_400_000_000,
        loaded=False,
    )
]
SESSIONS = [
    SessionState(session_id="session-0123456789ab", project="a", pending=3, unnamed_samplers=0)
]
GOLDEN: list[tuple[Sequence[Value], tuple[str, ...], str]] = [
    (
        RUNS,
        RUN,
        """\
run_id            name       status  step  base_model
run-0123456789a1  reverse-1  active  120   Qwen/Qwen3-0.6B-Instruct-2507
run-0123456789a2  reverse-2  active  240   Qwen/Qwen3-0.6B-Instruct-2507
""",
    ),
    (
        CHECKPOINTS,
        CHECKPOINT,
        """\
path                                           step  size_bytes  created_at
weaver://run-0123456789a1/sampler/step-000120  120   1.2 MB      4 h ago
""",
    ),
    (
        MODELS,
        MODEL,
        """\
name             num_parameters  context_length  size_bytes  loaded
Qwen/Qwen3-0.6B  596049920       40960           2.4 GB      False
""",
    ),
    (
        SESSIONS,
        SESSION,
        """\
session_id            project  pending  unnamed_samplers
session-0123456789ab  a        3        0
""",
    ),
]


@pytest.mark.parametrize(("rows", "columns", "table"), GOLDEN)
def test_every_list_at_80_columns(
    rows: Sequence[Value],
    columns: tuple[str, ...],
    table: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show(rows, columns=columns)
    assert capsys.readouterr().out == table
    monkeypatch.setenv("COLUMNS", "10")
    show(rows, columns=columns)
    printed = capsys.readouterr()
    first = [line.split()[0] for line in table.splitlines()]
    assert printed.out.splitlines() == first and columns[1] in printed.err


def test_wide_and_pipes_have_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show(RUNS, columns=RUN)
    assert "project" in capsys.readouterr().out.splitlines()[0]
    show(RUNS, columns=RUN, wide=True)
    wide = capsys.readouterr().out
    assert "lora_config" in wide and '"rank":8' in wide
    show(RUNS, Format.tsv, columns=RUN)
    header, *lines = capsys.readouterr().out.splitlines()
    assert {len(line.split("\t")) for line in lines} == {len(header.split("\t"))} == {11}
    assert lines[0].split("\t")[5] == RUNS[0].last_request_at.isoformat()
    show([], Format.tsv, columns=RUN, empty="No runs.")
    assert capsys.readouterr().out == "\t".join(RUN) + "\n"
    show(RUNS, Format.json, columns=RUN)
    assert json.loads(capsys.readouterr().out)[1]["user_metadata"] == {"a": "b\tc"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-0.4, "0 s ago"), (-119, "119 s ago"), (-130, "2 min ago"), (-7000, "117 min ago"),
     (-7300, "2 h ago"), (180_000, "in 2 days"), (90, "in 90 s")],
)  # fmt: skip
def test_times_are_told_from_now(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_a_run_is_followed(saved: tuple[str, str]) -> None:
    run, _ = saved
    log(run, {"reward/mean": 0.25, "train/loss": 1.5}, 1)
    log(run, {"reward/mean": 0.75, "train/loss": 0.5}, 2)
    assert weaver("runs", "tail", run) == (
        "1 reward/mean=0.250 train/loss=1.500\n2 reward/mean=0.750 train/loss=0.500\n"
    )
    assert weaver("runs", "tail", run, "-n", "1", "-m", "train/loss") == "2 train/loss=0.500\n"
    assert weaver("runs", "tail", run, "-n", "0") == ""
    log(run, {"reward": 0.25}, 2)
    drawn = weaver("runs", "watch", run, "--once")
    assert "reward/mean: 0.750" in drawn and "train/loss: 0.500" in drawn and "│" in drawn
    assert "\nreward: 0.250" in drawn, "whatever the console's list tells of a run"
    assert "absent: nothing yet" in weaver("runs", "watch", run, "--once", "-m", "absent")
    shown = weaver("runs", "show", run)
    assert "\n  train/loss" in shown and "0.500" in shown


def test_following_prints_the_newest_step_too_and_goes_on(saved: tuple[str, str]) -> None:
    run, _ = saved
    log(run, {"train/loss": 1.5}, 1)
    program = "from weaver.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "runs", "tail", run, "-f"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1 train/loss=1.500\n"
        log(run, {"train/loss": 0.5}, 2)
        assert process.stdout.readline() == "2 train/loss=0.500\n"
        process.terminate()


def log(run: str, metrics: dict[str, float], step: int) -> None:
    import anyio

    from weaver.client.http import HttpService
    from weaver.config import environment
    from weaver.types import MetricPoint

    async def send() -> None:
        async with HttpService(environment()["WEAVER_BASE_URL"]) as service:
            points = [MetricPoint(name=n, value=v, step=step) for n, v in metrics.items()]
            await service.log_metrics(run, points)

    anyio.run(send)


def test_the_version_is_that_of_the_package() -> None:
    import weaver as package

    assert weaver("--version") == f"{package.__version__}\n"
    assert "ServiceClient" in dir(package) and "__version__" in dir(package)
