"""Faults of the world around a server: a full disk, a clock that jumps, clients that misbehave."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from tests.server.test_durability import train, until, weights
from tests.server.test_service import Recorder
from weaver import AsyncServiceClient
from weaver.client.http import HttpService
from weaver.errors import CheckpointNotFoundError, ConflictError, StorageError
from weaver.protocol import GradientsDone, Sample, SaveCheckpoint, StepDone
from weaver.server.checkpoints import now_utc
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.server.settings import Durability, ServerSettings
from weaver.types import Datum, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from datetime import datetime
    from pathlib import Path

    from weaver.server.serve import Running
    from weaver.server.view import View

pytestmark = pytest.mark.anyio
DATUMS = list(GRADIENT.datums)
ADAM = {"learning_rate": 0.1}


@asynccontextmanager
async def service_on(
    home: Path,
    database: Path,
    *,
    engine: FakeEngine | None = None,
    now: Callable[[], datetime] = now_utc,
    **options: float,
) -> AsyncIterator[View]:
    opened = open_database(database)
    async with LocalService(
        engine or FakeEngine(context_length=2**20),
        home=home,
        store=Journal(opened),
        durability=Durability(snapshot_every_s=0.0),
        now=now,
        **options,  # type: ignore[arg-type]
    ) as service:
        yield service
    opened.dispose()


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return filler


async def test_a_submission_that_a_full_disk_cannot_take_may_be_sent_again(
    small_disk: Path, home: Path
) -> None:
    tokens = random.Random(0).choices(range(256), k=40_000)  # which cannot be compressed
    datum = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": tokens})
    large = GRADIENT.model_copy(update={"datums": (datum,)})
    async with service_on(home, small_disk) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        filler = fill(small_disk)
        submission = caller.stamp(large, run)
        for _ in range(2):
            with pytest.raises(StorageError, match="full"):
                await caller.send(submission)
        filler.unlink()
        await caller.send(submission)
        assert isinstance(await caller.result(submission.id), GradientsDone)
        await caller.do(STEP, StepDone, run_id=run)
        expected = await weights(caller, run)
    async with service_on(home, small_disk) as service:
        caller.service = service
        assert (await service.get_run(run)).step == 3
        assert await weights(caller, run) == expected


@pytest.mark.parametrize("room_again", [False, True])
async def test_an_operation_of_which_a_failure_was_told_is_not_carried_out_later(
    small_disk: Path, tmp_path: Path, home: Path, room_again: bool
) -> None:
    fillers: list[Path] = []

    def take_all_room(name: str, argument: object) -> None:
        if name == "optim_step":
            fillers.append(fill(small_disk))

    async with service_on(home, small_disk, engine=FakeEngine(hook=take_all_room)) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        step = await caller.start(STEP, run)
        assert not await service.collect(caller.session_id, after=caller.cursor, timeout_s=0.5)
        assert fillers
        if room_again:
            fillers[0].unlink()
            assert (told := await caller.outcome(step)).error is not None
            assert told.error.code == "storage_error"
        killed = shutil.copytree(small_disk, tmp_path / "killed")  # as a kill would leave it
    async with service_on(home, killed) as service:
        caller.service = service
        if not room_again:
            assert isinstance(await caller.result(step), StepDone)
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == 1 + (not room_again)


async def test_checkpoints_and_snapshots_wait_for_room(small_disk: Path, tmp_path: Path) -> None:
    database = tmp_path / "database"
    async with service_on(small_disk, database) as service:
        caller = await Caller.open(service)
        run, other = await caller.create(), await caller.create()
        await train(caller, run, steps=1)
        filler = fill(small_disk)
        save = SaveCheckpoint(purpose="state", name="x")
        assert await caller.refused(save, run_id=run) == "storage_error"
        await train(caller, run, steps=2)  # no snapshot of these
        await train(caller, other, steps=1)
        assert await service.list_checkpoints() == []
        filler.unlink()
        await caller.save(run, name="x")
        expected = await weights(caller, run)
    async with service_on(small_disk, database) as service:
        caller.service = service
        assert [(c.name, c.step) for c in await service.list_checkpoints()] == [("x", 3)]
        assert await weights(caller, run) == expected


# --- clocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [timedelta(days=3650), -timedelta(days=3650)])
async def test_a_clock_that_jumps_moves_only_times_to_live(
    home: Path, jump: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = timedelta()
    recorder = Recorder()
    async with service_on(
        home,
        home,
        engine=FakeEngine(hook=recorder),
        now=lambda: now_utc() + offset,
        gap_timeout_s=0.4,
        sweep_every_s=0.02,
    ) as service:
        caller = await Caller.open(service)
        run, _ = await caller.create(), await caller.create()
        await train(caller, run, steps=2)
        kept = await caller.save(run, name="kept")
        brief = SaveCheckpoint(purpose="state", name="brief", ttl_seconds=3600)
        await caller.result(await caller.start(brief, run))
        before = await weights(caller, run)
        late = caller.stamp(GRADIENT, run)
        behind = await caller.start(STEP, run)  # waits for the one that comes late
        began = anyio.current_time()
        offset, real = jump, time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump.total_seconds())
        assert not await service.collect(caller.session_id, after=caller.cursor, timeout_s=0.2)
        assert anyio.current_time() - began >= 0.2
        assert [0.2 <= one.waited_s < 20 for one in service.parts.activity.pending_of(run)] == [
            True
        ]
        assert not recorder.count("delete_run")  # as it would be of a run that is idle for long
        await caller.send(late)
        assert isinstance(await caller.result(behind), StepDone)
        assert await weights(caller, run) != before
        await service.get_checkpoint(kept)
        if jump > timedelta():
            with pytest.raises(CheckpointNotFoundError):
                await service.get_checkpoint(kept.replace("kept", "brief"))
        else:
            await service.get_checkpoint(kept.replace("kept", "brief"))


# --- clients ------------------------------------------------------------------------------------


@pytest.fixture
def server(home: Path) -> Iterator[Running]:
    engine = FakeEngine(hook=lambda name, argument: time.sleep(0.001))
    with serving(engine, ServerSettings(home=home, port=0, auth=False)) as server:
        yield server


async def test_two_clients_of_one_run_take_turns(server: Running) -> None:
    steps: list[float] = []

    async def steps_of(client: AsyncServiceClient, run: str) -> None:
        trainer = await client.attach(run)
        for _ in range(15):
            trainer.forward_backward(DATUMS, loss_fn="cross_entropy")
            done = await trainer.optim_step(ADAM)
            steps.append(done.metrics["step"])

    async with AsyncServiceClient(server.address) as one, AsyncServiceClient(server.address) as two:
        run = (await one.create_model("fake", {"rank": 4})).model_id
        async with anyio.create_task_group() as tasks:
            for client in (one, two):
                tasks.start_soon(steps_of, client, run)
    assert len(set(steps)) == len(steps) and max(steps) <= 30


async def test_two_clients_of_one_session_get_a_named_conflict(server: Running) -> None:
    async with HttpService(server.address) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        twin = Caller(service, caller.session_id)
        submission = twin.stamp(STEP, run)
        with pytest.raises(
            ConflictError, match=rf"seq 1 of run {run} belongs to .*{submission.id}"
        ):
            await twin.send(submission)
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == 3


CLIENT = """
import asyncio, os, sys
from tests.contracts.caller import GRADIENT, STEP, Caller
from weaver.client.http import HttpService
async def main():
    caller = await Caller.open(HttpService(sys.argv[1]))
    run = await caller.create()
    await caller.send(*(caller.stamp(o, run) for o in (GRADIENT, STEP) * 20))
    print(run, flush=True)
    await caller.service.collect(caller.session_id, after=1, timeout_s=0)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


async def test_work_of_a_client_that_dies_is_done(server: Running) -> None:
    command = [sys.executable, "-c", CLIENT, server.address]
    died = await anyio.run_process(command, check=False)
    assert died.returncode == -9
    run = died.stdout.decode().strip()
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:  # dies in the middle of a request
        half.sendall(
            b"POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"
        )
    async with HttpService(server.address) as service:

        async def done() -> bool:
            return (await service.get_run(run)).step == 20

        await until(done)
        caller = await Caller.open(service)
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == 21


@pytest.mark.parametrize("route", ["stream/{sample}", "outcomes?after=1&timeout=20"])
async def test_a_reader_that_never_reads_stops_nobody(server: Running, route: str) -> None:
    async with HttpService(server.address) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        params = SamplingParams(max_tokens=200)
        sample = await caller.start(
            Sample(sampler_id="base:fake", prompt="x", params=params, num_samples=50, stream=True)
        )
        host, port = server.address.removeprefix("http://").split(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            deaf.connect((host, int(port)))
            path = f"/v1/sessions/{caller.session_id}/{route.format(sample=sample)}"
            deaf.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            await train(caller, run, steps=3)
            sampled = await caller.result(sample)
            assert len(sampled.output.sequences) == 50  # type: ignore[union-attr]
