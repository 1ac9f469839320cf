"""Ranks that end, hang, have no room or differ: named, bounded in time, and nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

pytest.importorskip("ray")

from tests.contracts.caller import STEP, Caller
from tests.engine.cluster.test_ranks import data_of
from weaver.config import EngineSettings, changed
from weaver.engine.cluster.config import ClusterConfig, GroupConfig
from weaver.engine.cluster.engine import ClusterEngine
from weaver.engine.cluster.group import check_alike
from weaver.engine.cluster.placement import Cluster, Room
from weaver.engine.cluster.pooled_cluster import open_cluster
from weaver.engine.cluster.rank import Facts
from weaver.engine.cluster.status import read_status
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import ConfigError, EngineError
from weaver.files import hold_lock, release_lock
from weaver.protocol import (
    CreateModel,
    ForwardBackward,
    GradientsDone,
    ModelCreated,
    SaveCheckpoint,
    StepDone,
)
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.types import Datum, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.engine.cluster.group import TrainerGroup
    from weaver.protocol import Outcome
    from weaver.types import TrainingMode

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
GROUP = partial(GroupConfig, model="weaver-nano", device="cpu", threads=1, cpus=0.5)
NAME = "weaver-nano#0"


def opened(home: Path, group: GroupConfig) -> ClusterEngine:
    config = ClusterConfig(address="local", trainer=(group,))
    return ClusterEngine(TorchEngine(device="cpu", threads=1), config, home=home)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterEngine]:
    engine = opened(tmp_path_factory.mktemp("home"), GROUP(ranks=2, call_s=60.0, place_s=6.0))
    yield engine
    engine.close()


@pytest.fixture
def group(engine: ClusterEngine) -> TrainerGroup:
    return engine._groups[NAME]


class Patient(Caller):
    """Waits as long as ranks may take to start on a machine that is busy."""

    async def outcome(self, submission_id: str) -> Outcome:
        with anyio.fail_after(120):
            while submission_id not in self.outcomes:
                with suppress(TimeoutError):
                    await Caller.outcome(self, submission_id)
        return self.outcomes[submission_id]

    async def model(self, mode: TrainingMode = "lora") -> str:
        lora = LoraConfig(rank=4, seed=0) if mode == "lora" else None
        operation = CreateModel(base_model="weaver-nano", training_mode=mode, lora_config=lora)
        return (await self.do(operation, ModelCreated)).run.run_id


def kill(group: TrainerGroup, rank: int, how: int = signal.SIGKILL) -> None:
    assert group.ranks is not None
    os.kill(group.ranks.facts[rank].pid, how)


def gradient(seed: int, *lengths: int) -> ForwardBackward:
    return ForwardBackward(
        datums=tuple(data_of("cross_entropy", *lengths, seed=seed)), loss_fn="cross_entropy"
    )


async def loop_of(
    engine: ClusterEngine,
    home: Path,
    *,
    killed_at: str = "",
    rank: int = 1,
    mode: TrainingMode = "lora",
) -> list[Any]:
    """All that a client sees of three steps."""
    group, seen = engine._groups[NAME], list[Any]()
    database = open_database(home, None)

    def reached(place: str) -> None:
        if place == killed_at:
            kill(group, rank)

    async with LocalService(engine, home=home, store=Journal(database)) as service:
        caller = await Patient.open(service)
        run = await caller.model(mode)
        for step in range(3):
            last, long = step == 2, gradient(step, *[200] * 40)
            passing = await caller.start(long, run)
            if last and killed_at == "pass":
                await anyio.sleep(0.3)
                reached("pass")
            seen.append((await caller.outcome(passing)).result)
            if last:
                reached("gradient")
            seen.append(await caller.do(gradient(9 + step, 30, 8), GradientsDone, run_id=run))
            stepping = await caller.start(STEP, run)
            if last:
                reached("step")
            seen.append((await caller.outcome(stepping)).result)
            if step == 1:
                saving = SaveCheckpoint(purpose="state", name="one")
                submission = await caller.start(saving, run)
                reached("save")
                assert (await caller.outcome(submission)).error is None
        forward = gradient(0, 30, 8).model_copy(update={"backward": False})
        seen.append(await caller.do(forward, GradientsDone, run_id=run))
        await service.delete_run(run)
    database.dispose()
    assert all(isinstance(one, (GradientsDone, StepDone)) for one in seen), seen
    return [(dict(one.output.metrics), _logprobs(one)) for one in seen]


def _logprobs(result: Any) -> Any:
    outputs = getattr(result.output, "loss_fn_outputs", ())
    return [output["logprobs"].to_numpy().tolist() for output in outputs]


@pytest.mark.slow
async def test_a_rank_that_is_killed_is_a_pause_and_all_is_bit_identical(
    engine: ClusterEngine, group: TrainerGroup, tmp_path: Path
) -> None:
    undisturbed = await loop_of(engine, tmp_path / "home")
    starts = group.starts
    for number, (place, rank) in enumerate(
        [("pass", 1), ("pass", 0), ("gradient", 1), ("step", 0), ("save", 0)], start=1
    ):
        began = time.monotonic()
        seen = await loop_of(engine, tmp_path / f"{place}-{rank}", killed_at=place, rank=rank)
        assert seen == undisturbed, place
        assert group.starts == starts + number, place
        assert time.monotonic() - began < 120


@pytest.mark.slow
async def test_a_rank_that_hangs_is_given_up_in_time(
    engine: ClusterEngine, group: TrainerGroup, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(home, None)
    async with LocalService(engine, home=home, store=Journal(database)) as service:
        caller = await Patient.open(service)
        run = await caller.model()
        first = await caller.do(gradient(0, 30, 8), GradientsDone, run_id=run)
        starts = group.starts
        monkeypatch.setattr(group, "config", group.config.model_copy(update={"call_s": 5.0}))
        assert group.ranks is not None
        hung = group.ranks.facts[1].pid
        kill(group, 1, signal.SIGSTOP)
        again = await caller.do(gradient(0, 30, 8), GradientsDone, run_id=run)
        assert group.starts == starts + 1
        assert not _runs(hung)
        assert "not all have answered forward_backward" in (group.last_loss or "")
        assert dict(again.output.metrics) == dict(first.output.metrics)
    database.dispose()


@pytest.mark.slow
async def test_a_datum_that_is_not_finite_loses_no_rank(
    engine: ClusterEngine, group: TrainerGroup, home: Path
) -> None:
    database = open_database(home, None)
    async with LocalService(engine, home=home, store=Journal(database)) as service:
        caller = await Patient.open(service)
        run = await caller.model()
        starts = group.starts
        [good, bad] = data_of("importance_sampling", 12, 20)
        far = {**bad.loss_fn_inputs, "logprobs": [-2000.0] * bad.model_input.length}
        bad = Datum(model_input=bad.model_input, loss_fn_inputs=far)
        operation = ForwardBackward(datums=(good, bad), loss_fn="importance_sampling")
        assert await caller.refused(operation, run_id=run) == "non_finite"
        assert await caller.refused(STEP, run_id=run) == "gradients_discarded"
        await caller.do(gradient(0, 9), GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)
        assert group.starts == starts
    database.dispose()


@pytest.mark.slow
async def test_a_group_without_room_waits_and_says_for_what(
    engine: ClusterEngine, group: TrainerGroup, home: Path
) -> None:
    group.close()
    taken = Room(engine._cluster.session, {"CPU": float(os.cpu_count() or 1)}, 1)
    assert taken.wait()
    try:
        with pytest.raises(EngineError, match=r"no room for weaver-nano#0 in 6 s: 2 x \(0.5 CPU\)"):
            await _make(engine)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_make, engine)
            with anyio.fail_after(20):
                for _ in range(100):
                    if group.state == "waiting":
                        break
                    await anyio.sleep(0.1)
            [told] = read_status(engine.folder).groups
            assert told.state == "waiting" and "free 0 CPU" in (told.waits_for or "")
            taken.give_back()
        assert group.state == "ready"
    finally:
        await engine.delete_run("waits")


async def _make(engine: ClusterEngine) -> None:
    config = LoraConfig(rank=4)
    await engine.create_run(
        "waits", "weaver-nano", training_mode="lora", lora_config=config, seed=0
    )


@pytest.mark.slow
async def test_a_shared_folder_that_a_rank_does_not_see_is_named(
    engine: ClusterEngine, group: TrainerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.close()
    monkeypatch.setattr(group, "_proof", (Path("/nowhere/proof"), "x"))
    with pytest.raises(EngineError, match="does not see /nowhere"):
        await _make(engine)


@pytest.mark.slow
def test_a_file_that_does_not_fit_the_machine_is_refused_at_the_start(
    engine: ClusterEngine,
) -> None:
    group = GROUP(ranks=500)
    with pytest.raises(ConfigError, match=r"trainer\.0\.ranks: asks for 500 ranks.* 250 CPU"):
        engine._cluster._check_room(ClusterConfig(address="local", trainer=(group,)))
    gpus = GROUP(device="cuda")
    with pytest.raises(ConfigError, match="1 GPU; this machine has 0"):
        engine._cluster._check_room(ClusterConfig(address="local", trainer=(gpus,)))


FACTS = Facts(
    host="a", pid=1, device="cpu", dtype="float32", versions={"torch": "2.13.0", "python": "3.12"}
)


def test_another_version_on_a_rank_is_named() -> None:
    check_alike([FACTS, replace(FACTS, host="b", pid=2)])
    other = replace(FACTS, host="b", versions={**FACTS.versions, "torch": "2.12.1"})
    with pytest.raises(ConfigError, match=r"rank 1 on b has torch 2\.12\.1, rank 0 on a has 2\.13"):
        check_alike([FACTS, other])
    with pytest.raises(ConfigError, match="rank 1 on a computes on cuda:0"):
        check_alike([FACTS, replace(FACTS, device="cuda:0")])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quantize": "int8"}, "quantize: is int8"),
        ({"sampler": "vllm", "deterministic": True}, "deterministic: is on"),
        (
            {"sampler": "vllm", "sampler_devices": "0,1"},
            "sampler_devices: is set, and in a cluster",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_cluster_are_refused_at_the_start(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        open_cluster(changed(EngineSettings(), given), file=None, address=None)


def test_an_address_at_which_nothing_listens_is_named_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = ClusterConfig(address=f"127.0.0.1:{port}", trainer=(GROUP(),))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"address: nothing listens at '127.0.0.1:{port}'"):
        Cluster.open(config)
    assert time.monotonic() - began < 10


def test_a_shared_folder_is_one_servers_and_is_tidied(home: Path) -> None:
    """Whatever becomes of the start, which finds no Ray here."""
    folder, left = home / "cluster", home / "cluster" / "live-of-a-server-that-was-killed"
    left.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = ClusterConfig(address=f"127.0.0.1:{port}", trainer=(GROUP(),))
    local = TorchEngine(device="cpu", threads=1)
    lock = hold_lock(folder, what="It", hint="")
    with pytest.raises(ConfigError, match=r"shared: The folder .* is in use by another process"):
        ClusterEngine(local, config, home=home)
    assert left.exists()
    release_lock(lock)
    with pytest.raises(ConfigError, match="nothing listens at"):
        ClusterEngine(local, config, home=home)
    assert [file.name for file in folder.iterdir()] == ["lock"]
    release_lock(hold_lock(folder, what="It", hint=""))


SERVER = """
import sys, anyio
from pathlib import Path
from tests.engine.cluster.test_failures import GROUP, _make, opened
engine = opened(Path(sys.argv[1]), GROUP(ranks=2))
anyio.run(_make, engine)
print("ready", flush=True)
anyio.run(anyio.sleep_forever)
"""


@pytest.mark.slow
def test_what_a_killed_server_has_started_ends_with_it(home: Path) -> None:
    home.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(home)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    while "ready" not in (line := server.stdout.readline()):
        assert line, "it has ended"
    [group] = read_status(home / "cluster").groups
    raylets = {_parent(rank.pid) for rank in group.ranks}
    server.kill()
    server.wait()
    server.stdout.close()
    end = time.monotonic() + 10
    left = {rank.pid for rank in group.ranks} | raylets
    while left and time.monotonic() < end:
        left = {pid for pid in left if _runs(pid)}
        time.sleep(0.1)
    assert not left
    with pytest.raises(ConfigError, match="has ended"):
        read_status(home / "cluster")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
