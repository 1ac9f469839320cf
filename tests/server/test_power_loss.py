"""A machine that loses power loses the last commits of SQLite, and no more than their outcomes.

A loss is played by the database's files as they were earlier, beside the folders of later.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import anyio
import pytest
import sqlalchemy as sa

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_durability import ALWAYS, SAMPLE, server, train, until, weights
from tests.server.test_service import Recorder
from weaver.errors import StorageError
from weaver.protocol import GradientsDone, Sampled, StepDone
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.settings import Durability

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from weaver.server.view import View


pytestmark = pytest.mark.anyio
FILES = ("server.db", "server.db-wal", "server.db-shm")


def keep(home: Path, kept: Path) -> None:
    kept.mkdir()
    for name in FILES[:2]:
        if (home / name).exists():
            shutil.copy(home / name, kept / name)


def lose_power(home: Path, kept: Path) -> None:
    for name in FILES:
        (home / name).unlink(missing_ok=True)
    for file in kept.iterdir():
        shutil.copy(file, home / file.name)


async def snapshotted(service: View, run: str, *, step: int) -> None:
    """Waits until the snapshot of a step is the only one."""

    async def there() -> bool:
        steps = [info.step for info in service.parts.live.list(run)]
        return steps == [step] and not service.parts.registry.runs[run].committing.locked()

    await until(there)


async def test_a_run_and_its_client_go_on_from_the_newest_snapshot(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(home, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        for step in range(1, 7):
            await train(caller, run, steps=1)
            await snapshotted(service, run, step=step)
            if step == 3:
                keep(home, tmp_path / "kept")
        expected = await weights(caller, run)
    lose_power(home, tmp_path / "kept")
    async with server(home, durability=ALWAYS) as service:
        assert "newer than the database" in caplog.text
        assert (await service.get_run(run)).step == 6
        caller.service = service
        caller.seqs[run] -= 1  # a forward pass changes nothing, so no snapshot knows of it
        assert await weights(caller, run) == expected
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        step = await caller.do(STEP, StepDone, run_id=run)
        assert step.output.metrics["step"] == 7
        await snapshotted(service, run, step=7)
    async with server(home, durability=ALWAYS) as service:
        assert (await service.get_run(run)).step == 7


async def test_what_the_snapshot_holds_is_not_carried_out_again(home: Path, tmp_path: Path) -> None:
    record = Recorder()
    record.hold = "optim_step"
    async with server(home, engine=FakeEngine(hook=record), durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        ids = [await caller.start(operation, run) for operation in (GRADIENT, STEP)]
        await record.until_held()
        keep(home, tmp_path / "kept")  # both were submitted, neither has an outcome on the disk
        record.go_on.set()
        await snapshotted(service, run, step=1)
    lose_power(home, tmp_path / "kept")
    async with server(home, durability=ALWAYS) as service:
        caller = Caller(service, caller.session_id, cursor=caller.cursor, seqs=caller.seqs)
        errors = [(await caller.outcome(id)).error for id in ids[1:]]
        assert [error.message.split(",")[0] for error in errors if error] == ["it was carried out"]
        assert (await service.get_run(run)).step == 1
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        step = await caller.do(STEP, StepDone, run_id=run)
        assert step.output.metrics["step"] == 2


async def test_a_client_that_knows_more_than_the_journal_gets_new_outcomes(
    home: Path, tmp_path: Path
) -> None:
    async with server(home) as service:
        caller = await Caller.open(service)
        await caller.do(SAMPLE, Sampled)
        keep(home, tmp_path / "kept")
        for _ in range(3):
            await caller.do(SAMPLE, Sampled)
    lose_power(home, tmp_path / "kept")
    async with server(home) as service:
        caller.service = service
        early = await caller.start(SAMPLE)  # may end before it is asked for
        await anyio.sleep(0.1)
        await caller.outcome(early)
        await caller.do(SAMPLE, Sampled)


async def test_a_snapshot_is_flushed_before_former_ones_go(home: Path) -> None:
    database = open_database(home)
    statements: list[str] = []

    @sa.event.listens_for(database, "connect")
    def trace(connection: sqlite3.Connection, _: object) -> None:
        connection.set_trace_callback(statements.append)

    database.dispose()
    store = Journal(database)
    await store.put_snapshot("run-1", 5)
    levels = [s for s in statements if "synchronous" in s or s.startswith("UPDATE runs")]
    assert levels[-2].endswith("synchronous=2") and levels[-1].startswith("UPDATE runs")
    await store.close_session("a")
    assert "PRAGMA synchronous=1" in statements[statements.index(levels[-1]) :]
    database.dispose()


class NotTold(Journal):
    """Whose database takes no word of a snapshot, as when its disk is full."""

    async def put_snapshot(self, run_id: str, number: int) -> None:
        raise StorageError("the disk is full.")


async def test_a_snapshot_that_the_database_knows_nothing_of_takes_back_no_step(home: Path) -> None:
    rarely = Durability(snapshot_every_steps=2, snapshot_every_s=0.0)
    async with server(home, durability=rarely, store=NotTold) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        await snapshotted(service, run, step=2)
        await train(caller, run, steps=1)
        expected = await weights(caller, run)
    async with server(home, durability=rarely) as service:
        caller.service = service
        assert (await service.get_run(run)).step == 3
        assert await weights(caller, run) == expected
