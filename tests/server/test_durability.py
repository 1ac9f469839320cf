"""What outlives the service: runs, sessions, outcomes, pending work; and what when that fails."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa

from tests.contracts.caller import BAD_GRADIENT, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_service import Recorder
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import (
    ConfigError,
    ConflictError,
    RunNotFoundError,
    ServiceConnectionError,
    StorageError,
)
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    GradientsDone,
    LoadCheckpoint,
    Sample,
    Sampled,
    SaveCheckpoint,
    StepDone,
    Submission,
)
from weaver.server import database as databases
from weaver.server import tables
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.keys import OWNER
from weaver.server.records import SessionRecord
from weaver.server.service import LocalService
from weaver.server.settings import Durability
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from weaver.protocol import Outcome
    from weaver.server.records import RunRecord, Settled
    from weaver.server.view import View
    from weaver.types import TrainingRun

pytestmark = pytest.mark.anyio
ALWAYS = Durability(snapshot_every_s=0.0)
NEVER = Durability(snapshot_every_s=1e9)
embedded = partial(Journal, keeps="runs")
SAMPLE = Sample(
    sampler_id="base:fake",
    prompt=ModelInput.from_ints(list(b"hi")),
    params=SamplingParams(max_tokens=8),
)


@asynccontextmanager
async def server(
    home: Path,
    *,
    engine: FakeEngine | None = None,
    durability: Durability = NEVER,
    store: Callable[[sa.Engine], Journal] = Journal,
) -> AsyncIterator[View]:
    database = open_database(home)
    try:
        async with LocalService(
            engine or FakeEngine(),
            home=home,
            store=store(database),
            deterministic=True,
            durability=durability,
        ) as service:
            yield service
    finally:
        database.dispose()


async def weights(caller: Caller, run: str) -> list[float]:
    """What a forward pass of the run says, bit by bit."""
    forward = GRADIENT.model_copy(update={"backward": False})
    done = await caller.do(forward, GradientsDone, run_id=run)
    return list(done.output.loss_fn_outputs[0]["logprobs"].to_numpy())


async def train(caller: Caller, run: str, *, steps: int) -> None:
    for _ in range(steps):
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(10):
        while True:
            if await condition():
                return
            await anyio.sleep(0.01)


@pytest.mark.parametrize("durability", [ALWAYS, NEVER])
async def test_a_client_goes_on_where_it_was(home: Path, durability: Durability) -> None:
    async with server(home, durability=durability) as service:
        about = {"who": "me", "$": [1, {"x": "é"}]}
        caller = Caller(service, (await service.open_session(user_metadata=about)).session_id)
        run = await caller.create()
        await train(caller, run, steps=3)
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        sampler = await caller.save(run, "sampler")
        uncollected = await caller.start(SAMPLE)
        await anyio.sleep(0.05)
        expected = await weights(caller, run)
    async with server(home, durability=durability) as service:
        caller.service = service
        assert [one.user_metadata for one in await service.list_sessions()] == [about]
        assert (await service.get_run(run)).step == 3
        assert await weights(caller, run) == expected
        resent = caller.stamp(STEP, run)
        await caller.send(resent, resent)
        await caller.send(resent)
        step = await caller.result(resent.id)
        assert isinstance(step, StepDone) and step.output.metrics["step"] == 4
        await caller.result(uncollected)
        again = SAMPLE.model_copy(update={"sampler_id": sampler})
        sampled = await caller.do(again, Sampled)
        assert sampled.output.sequences[0].weights_version == 3
        with pytest.raises(ConflictError, match=r"seq \d+ of run"):
            await caller.send(resent.model_copy(update={"id": "another"}))
        await service.close_session(caller.session_id)
        other = await Caller.open(service)
        await other.do(SAMPLE, Sampled)
        assert await other.refused(again) == "checkpoint_not_found"


async def test_the_outcome_of_a_resend_is_the_first_one(home: Path) -> None:
    async with server(home) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        gradient = caller.stamp(GRADIENT, run)
        first = await caller.outcome((await caller.send(gradient))[0])
    async with server(home) as service:
        await service.submit(caller.session_id, [gradient])
        outcomes = await service.collect(caller.session_id, after=first.cursor - 1, timeout_s=0)
        assert list(outcomes) == [first]
        caller.service = service
        await caller.do(STEP, StepDone, run_id=run)


async def test_pending_work_goes_on_by_itself(home: Path) -> None:
    record = Recorder()
    record.hold = "optim_step"
    async with server(home, engine=FakeEngine(hook=record)) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        batch = (GRADIENT, STEP, GRADIENT, BAD_GRADIENT, STEP, GRADIENT, STEP)
        ids = [await caller.start(operation, run) for operation in batch]
        await record.until_held()
    async with server(home) as service:
        caller.service = service
        outcomes = [await caller.outcome(submission_id) for submission_id in ids]
        codes = [outcome.error.code if outcome.error else None for outcome in outcomes]
        bad, discarded = "token_out_of_range", "gradients_discarded"
        assert codes == [None, None, None, bad, discarded, None, None]
        assert (await service.get_run(run)).step == 2
        assert not [e for e in await Journal(open_database(home)).entries() if not e.cursor]
    record.go_on.set()


async def test_a_restart_at_any_moment_changes_nothing(home: Path) -> None:
    expected = await _three_tenants(home / "whole", restarts=0)
    for seed in range(3):
        assert await _three_tenants(home / str(seed), restarts=6, seed=seed) == expected


async def _three_tenants(home: Path, *, restarts: int, seed: int = 0) -> list[object]:
    """What each of three clients saw: its outcomes in their order, and its final weights."""
    rng, callers, runs = random.Random(seed), [], []
    steps = 8
    sent: list[list[str]] = [[], [], []]
    plan = [GRADIENT, GRADIENT, STEP, SaveCheckpoint(purpose="sampler"), BAD_GRADIENT]
    for restart in range(restarts + 1):
        durability = Durability(snapshot_every_s=rng.choice([0.0, 0.01, 1e9]))
        async with server(home, durability=durability) as service:
            if restart == 0:
                callers = [await Caller.open(service) for _ in range(3)]
                runs = [await caller.create() for caller in callers]
            for caller in callers:
                caller.service = service
            share = steps if restart == restarts else rng.randrange(steps + 1)
            steps -= share
            for _ in range(share):
                for caller, run, ids in zip(callers, runs, sent, strict=True):
                    ids += await caller.send(*(caller.stamp(operation, run) for operation in plan))
            if restart < restarts:
                await anyio.sleep(rng.uniform(0, 0.1))
                continue
            for caller, ids in zip(callers, sent, strict=True):
                for submission_id in ids:
                    await caller.outcome(submission_id)
            return [
                ([_seen(caller.outcomes[i]) for i in ids], await weights(caller, run))
                for caller, run, ids in zip(callers, runs, sent, strict=True)
            ]
    raise AssertionError


def _seen(outcome: Outcome) -> object:
    """Of an outcome, what does not name the run."""
    match outcome.result:
        case GradientsDone(output=output) | StepDone(output=output):
            return dict(output.metrics)
        case CheckpointSaved(checkpoint=checkpoint):
            return checkpoint.step
    return outcome.error and outcome.error.code


async def test_what_a_snapshot_holds_leaves_the_journal(home: Path) -> None:
    async with server(home, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        path = await caller.save(run, name="kept")
        await train(caller, run, steps=5)
        load = LoadCheckpoint(path=path, include_optimizer=True)
        await caller.do(load, CheckpointLoaded, run_id=run)
        expected = await weights(caller, run)
        await service.delete_checkpoint(path)
        store = Journal(open_database(home))

        async def snapshotted() -> bool:
            record = await store.run(run)
            return record is not None and record.snapshot == 12

        await until(snapshotted)
        assert not [e for e in await store.executed(run, after=12) if e.number <= 12]
    async with server(home) as service:
        caller.service = service
        assert await weights(caller, run) == expected
        assert (await service.get_run(run)).step == 0


async def test_an_idle_run_leaves_the_engine_and_comes_back(home: Path) -> None:
    record = Recorder()
    database = open_database(home)
    async with LocalService(
        FakeEngine(hook=record),
        home=home,
        store=Journal(database),
        sweep_every_s=0.01,
        durability=Durability(unload_after_s=0.0),
    ) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        await caller.do(GRADIENT, GradientsDone, run_id=run)

        async def unloaded() -> bool:
            return record.count("delete_run") > 0

        await until(unloaded)
        step = await caller.do(STEP, StepDone, run_id=run)
        assert step.output.metrics["step"] == 3
        assert record.count("create_run") > 1
    database.dispose()


async def test_an_idle_run_goes_on_bit_by_bit_on_torch(home: Path) -> None:
    """With its optimizer's moments, and the gradients of a batch that was not stepped yet."""
    engine = TorchEngine(threads=1, deterministic=True)
    expected = await _nano(home / "whole", engine, unload=False)
    assert await _nano(home / "idle", engine, unload=True) == expected
    engine.close()


async def _nano(home: Path, engine: TorchEngine, *, unload: bool) -> tuple[object, ...]:
    """The metrics of the last step, and the bytes of the checkpoint after it."""
    database = open_database(home)
    after_s = 0.0 if unload else 1e9
    async with LocalService(
        engine,
        home=home,
        store=Journal(database),
        deterministic=True,
        sweep_every_s=0.02,
        durability=Durability(unload_after_s=after_s, snapshot_every_steps=2, snapshot_every_s=0.0),
    ) as service:
        caller = await Caller.open(service)
        run = await caller.create("weaver-nano")
        await train(caller, run, steps=3)
        await caller.do(GRADIENT, GradientsDone, run_id=run)

        async def unloaded() -> bool:
            try:
                engine.trainer.step(run)
            except RunNotFoundError:
                return True
            return False

        if unload:
            await until(unloaded)
        step = await caller.do(STEP, StepDone, run_id=run)
        path = await caller.save(run, name="end")
        folder = home / "runs" / run / "weights" / path.rpartition("/")[2]
        files = {
            file.name: file.read_bytes()
            for file in folder.rglob("*")
            if file.suffix == ".safetensors"
        }
    database.dispose()
    assert any("optim" in name for name in files), files.keys()
    return dict(step.output.metrics), files


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", [ALWAYS, NEVER])
async def test_a_run_that_was_deleted_stays_deleted(home: Path, durability: Durability) -> None:
    async with server(home, durability=durability) as service:
        caller = await Caller.open(service)
        run, other = await caller.create(), await caller.create()
        await train(caller, run, steps=2)
        uncollected = await caller.start(GRADIENT, run)
        await until(lambda: _idle(service, run))
        await service.delete_run(run)
        assert not (home / "live" / run).exists()
    async with server(home, durability=durability) as service:
        caller.service = service
        assert [r.run_id for r in await service.list_runs()] == [other]
        with pytest.raises(RunNotFoundError):
            await service.delete_run(run)
        assert (await caller.outcome(uncollected)).result is not None
        assert await caller.refused(GRADIENT, run_id=run) == "run_not_found"
        await train(caller, other, steps=1)
        await service.close_session(caller.session_id)
        database = open_database(home)
        with database.connect() as connection:
            query = sa.select(sa.func.count()).where(tables.operations.c.run_id == run)
            assert connection.scalar(query) == 0
        database.dispose()


@pytest.mark.parametrize("store", [Journal, embedded])
async def test_the_files_of_a_deleted_run_go_at_the_next_start(
    home: Path, store: Callable[[sa.Engine], Journal], tmp_path: Path
) -> None:
    live, kept = home / "live", tmp_path / "kept"
    async with server(home, durability=ALWAYS, store=store) as service:
        caller = await Caller.open(service)
        run, other, damaged = [await caller.create() for _ in range(3)]
        for each in (run, other, damaged):
            await train(caller, each, steps=1)
            await service.stop_run(each)
        await until(lambda: _written(live, run, other, damaged))
        shutil.copytree(live / run, kept)
        await service.delete_run(run)
    kept.rename(live / run)  # as if the process had ended before it removed them
    shutil.copytree(live / other, live / "run-of-another-database")
    database = open_database(home)
    with database.begin() as connection:
        damage = tables.runs.update().where(tables.runs.c.run_id == damaged)
        connection.execute(damage.values(description=b"damaged"))
    database.dispose()
    async with server(home, store=store) as service:
        assert not (live / run).exists()
        for there in (other, damaged, "run-of-another-database"):
            assert list((live / there).glob("weights/*/manifest.json"))
        await train(await Caller.open(service), other, steps=1)


async def _written(live: Path, *runs: str) -> bool:
    return all(list((live / run).glob("weights/*/manifest.json")) for run in runs)


async def test_a_run_that_another_process_has_is_not_deleted(home: Path) -> None:
    async with server(home, store=embedded) as one, server(home, store=embedded) as two:
        caller = await Caller.open(one)
        run = await caller.create()
        with pytest.raises(ConflictError, match="in use by another process"):
            await two.delete_run(run)
        assert [r.run_id for r in await one.list_runs()] == [run]
        assert (await two.get_run(run)).run_id == run
        await one.stop_run(run)
        await two.delete_run(run)
        assert await caller.refused(STEP, run_id=run) == "run_not_found"


async def _idle(service: View, run: str) -> bool:
    return (await service.get_run(run)).status == "idle"


async def test_a_damaged_entry_stops_its_run_alone(home: Path) -> None:
    async with server(home) as service:
        caller = await Caller.open(service)
        runs = [await caller.create() for _ in range(2)]
        for run in runs:
            await train(caller, run, steps=1)
        expected = await weights(caller, runs[1])
    database = open_database(home)
    with database.begin() as connection:
        damage = sa.text("UPDATE operations SET body = substr(body, 1, 40) WHERE run_id = :run")
        connection.execute(damage, {"run": runs[0]})
    database.dispose()
    async with server(home) as service:
        caller.service = service
        outcome = await caller.outcome(await caller.start(GRADIENT, runs[0]))
        assert outcome.error is not None and outcome.error.code == "storage_error"
        assert f"operation 1 of {runs[0]}" in outcome.error.message
        assert await weights(caller, runs[1]) == expected


async def test_a_damaged_snapshot_stops_its_run_alone(home: Path) -> None:
    async with server(home, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        runs = [await caller.create() for _ in range(2)]
        for run in runs:
            await train(caller, run, steps=1)
        await anyio.sleep(0.2)
    for file in (home / "live" / runs[0]).glob("weights/*/weight.npy"):
        file.write_bytes(b"damaged")
    async with server(home) as service:
        caller.service = service
        assert await caller.refused(GRADIENT, run_id=runs[0]) == "checkpoint_corrupt"
        await train(caller, runs[1], steps=1)


async def test_a_base_model_that_is_gone_stops_its_runs_alone(home: Path) -> None:
    async with server(home, engine=FakeEngine(models=("fake", "gone"))) as service:
        caller = await Caller.open(service)
        runs = [await caller.create(name) for name in ("gone", "fake")]
    async with server(home, engine=FakeEngine(models=("fake",))) as service:
        caller.service = service
        assert [run.base_model for run in await service.list_runs()] == ["gone", "fake"]
        assert await caller.refused(GRADIENT, run_id=runs[0]) == "unknown_model"
        await train(caller, runs[1], steps=1)


class LateSnapshot(Journal):
    """Takes a snapshot's number when `go` is set, or between two questions about its run."""

    def __init__(self, database: sa.Engine) -> None:
        super().__init__(database)
        self.go, self.put = anyio.Event(), anyio.Event()

    async def put_snapshot(self, run_id: str, number: int) -> None:
        await self.go.wait()
        await super().put_snapshot(run_id, number)
        self.put.set()

    async def run(self, run_id: str) -> RunRecord | None:
        record = await super().run(run_id)
        self.go.set()
        await self.put.wait()
        return record


async def test_a_run_comes_back_while_its_snapshot_is_still_being_written(home: Path) -> None:
    database = open_database(home)
    store = LateSnapshot(database)
    async with LocalService(FakeEngine(), home=home, store=store, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=1)
        await service.stop_run(run)
        step = [await caller.start(operation, run) for operation in (GRADIENT, STEP)][-1]
        await anyio.sleep(0.1)
        store.go.set()
        assert isinstance(await caller.result(step), StepDone)
    database.dispose()


class FullDisk(Journal):
    """Fails to write outcomes of the kinds in `full`."""

    full: tuple[type, ...] = ()

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        if any(isinstance(one.outcome.result, self.full) for one in settled):
            raise StorageError("the database failed: disk full", hint="Free some space.")
        await super().settle(settled, runs=runs)


async def test_an_outcome_that_cannot_be_written_never_happened(home: Path) -> None:
    database = open_database(home)
    store = FullDisk(database)
    async with LocalService(FakeEngine(), home=home, store=store, durability=NEVER) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        store.full = (StepDone,)
        assert await caller.refused(STEP, run_id=run) == "storage_error"
        store.full = (GradientsDone,)
        assert await caller.refused(GRADIENT, run_id=run) == "storage_error"
        store.full = ()
        assert await caller.refused(STEP, run_id=run) == "gradients_discarded"
        await train(caller, run, steps=1)
        expected = await weights(caller, run)
    database.dispose()
    async with server(home) as service:
        caller.service = service
        assert await weights(caller, run) == expected
        assert (await service.get_run(run)).step == 3


@pytest.mark.parametrize("room_again", [False, True])
async def test_nothing_is_told_that_is_not_in_the_journal(
    home: Path, room_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver.server.outcomes.DATABASE_AWAY_S", 0.1)
    monkeypatch.setattr("weaver.server.outcomes.DATABASE_PAUSE_S", 0.01)
    recorder = Recorder()
    store = FullDisk(open_database(home))
    async with LocalService(
        FakeEngine(hook=recorder), home=home, store=store, durability=NEVER, sweep_every_s=0.05
    ) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        store.full = (StepDone, type(None))  # not even that it failed can be written
        step = await caller.start(STEP, run)
        await until(lambda: _called(recorder, "optim_step", 3))
        assert not await service.collect(caller.session_id, after=caller.cursor, timeout_s=0.3)
        if room_again:  # and nobody asks for anything
            store.full = ()
            assert (outcome := await caller.outcome(step)).error is not None
            assert outcome.error.code == "storage_error"
            await caller.do(GRADIENT, GradientsDone, run_id=run)
    async with server(home, engine=FakeEngine(hook=recorder)) as service:
        caller.service = service
        if not room_again:  # its client knows of no failure, so it is carried out
            assert isinstance(await caller.result(step), StepDone)
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == 3 + (not room_again)


async def _called(recorder: Recorder, name: str, times: int) -> bool:
    return recorder.count(name) >= times


@pytest.mark.parametrize("what", ["settle", "put_run", "run"])
async def test_work_waits_for_a_database_that_is_away(
    home: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(home) as service:
        caller = await Caller.open(service)
        first = await caller.create()
        await train(caller, first, steps=1)
    really, times = getattr(Journal, what), 2

    async def away(*args: object, **options: object) -> object:
        nonlocal times
        times -= 1
        if times >= 0:
            raise ServiceConnectionError("the database cannot be reached")
        return await really(*args, **options)

    monkeypatch.setattr(Journal, what, away)
    async with server(home) as service:
        caller.service = service
        for run in (first, await caller.create()):
            await train(caller, run, steps=2)
    assert times < 0


@pytest.mark.parametrize(("store", "file"), [(Journal, "server.db"), (embedded, "embedded.db")])
async def test_work_waits_for_another_process_that_writes(
    home: Path, store: Callable[[sa.Engine], Journal], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver.server.database.BUSY_S", 0.02)
    opened = open_database(home, file=file)
    async with LocalService(FakeEngine(), home=home, store=store(opened)) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        step = caller.stamp(STEP, run)
        with closing(sqlite3.connect(home / file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            if store is Journal:  # nothing is accepted, and a client sends it again
                with pytest.raises(ServiceConnectionError, match="another process"):
                    await caller.send(step)
            else:  # what was done waits to be written
                await caller.send(step)
            await anyio.sleep(0.3)
            other.execute("ROLLBACK")
        await caller.send(step)
        await caller.result(step.id)
        await train(caller, run, steps=1)
        expected = await weights(caller, run)
        assert (await service.get_run(run)).step == 2
    opened.dispose()
    opened = open_database(home, file=file)
    async with LocalService(FakeEngine(), home=home, store=store(opened)) as service:
        again = await Caller.open(service)
        assert (await service.get_run(run)).step == 2
        assert await weights(again, run) == expected
    opened.dispose()


async def test_a_checkpoint_is_not_written_twice(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver.server.outcomes.DATABASE_AWAY_S", 0.0)
    database = open_database(home)
    store = FullDisk(database)
    async with LocalService(FakeEngine(), home=home, store=store) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        named = caller.stamp(SaveCheckpoint(purpose="state", name="x"), run)
        nameless = caller.stamp(SaveCheckpoint(purpose="state"), run)
        store.full = (CheckpointSaved, type(None))
        await caller.send(named, nameless)

        async def saved() -> bool:
            return len(await service.list_checkpoints()) == 2

        await until(saved)
        before = await service.list_checkpoints()
    database.dispose()
    async with server(home) as service:  # the journal knows nothing of the end of these two

        async def idle() -> bool:
            return (await service.get_run(run)).status == "idle"

        await until(idle)
        assert await service.list_checkpoints() == before
        outcomes = await service.collect(caller.session_id, after=1, timeout_s=5)
        assert [outcome.error for outcome in outcomes] == [None, None]


# --- two processes, and the embedded engine -----------------------------------------------------


async def test_a_home_has_one_server(home: Path) -> None:
    async with server(home):
        with pytest.raises(ConflictError, match="in use by another process"):
            async with server(home):
                pass
    async with server(home):
        pass


async def test_an_embedded_run_comes_back_after_its_last_step(home: Path) -> None:
    async with server(home, store=embedded) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=3)
        expected = await weights(caller, run)
        await caller.do(GRADIENT, GradientsDone, run_id=run)
    async with server(home, store=embedded) as service:
        caller = await Caller.open(service)
        assert [(r.run_id, r.step) for r in await service.list_runs()] == [(run, 3)]
        assert await weights(caller, run) == expected
        assert await caller.refused(STEP, run_id=run) == "no_gradients"
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == 4


async def test_two_processes_do_not_share_a_run(home: Path) -> None:
    async with server(home, store=embedded) as one, server(home, store=embedded) as two:
        first, second = await Caller.open(one), await Caller.open(two)
        run = await first.create()
        await train(first, run, steps=1)
        assert (await two.get_run(run)).step == 1
        assert await second.refused(STEP, run_id=run) == "conflict"
        await train(second, await second.create(), steps=1)
        await train(first, run, steps=1)
        await one.aclose()
        second.seqs.clear()
        third = await Caller.open(two)
        await train(third, run, steps=1)
        assert (await two.get_run(run)).step == 3


# --- the database -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 99])
def test_tables_of_another_version_are_refused(home: Path, version: int) -> None:
    database = open_database(home)
    assert set(sa.inspect(database).get_table_names()) == set(tables.metadata.tables)
    with database.begin() as connection:
        connection.execute(tables.schema.update().values(version=version))
    database.dispose()
    with pytest.raises(ConfigError, match=f"version {version}, .* knows 8.*begin anew"):
        open_database(home)


async def test_a_write_that_waits_for_another_process_stops_nothing_else(home: Path) -> None:
    database = open_database(home)
    store = Journal(database)
    await store.open_session(SessionRecord("a", OWNER))
    with closing(sqlite3.connect(home / "server.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.append, "a", [Submission(id="x", operation=None)])
            tasks.start_soon(store.append, "a", [Submission(id="y", operation=None)])
            await anyio.sleep(0.1)
            other.rollback()  # it waits for five seconds, so on the event loop this would be late
    assert {entry.submission_id for entry in await store.entries()} == {"x", "y"}
    database.dispose()


async def test_writes_that_wait_together_wait_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver.server.database.BUSY_S", 0.02)
    really, asked = databases.transaction, []

    def transaction(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return really(*args, **options)

    database = open_database(home)
    store = Journal(database)

    async def append(name: str) -> None:
        with pytest.raises(ServiceConnectionError, match="another process"):
            await store.append("a", [Submission(id=name, operation=None)])

    with closing(sqlite3.connect(home / "server.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(databases, "transaction", transaction)
        async with anyio.create_task_group() as tasks:
            for i in range(10):
                tasks.start_soon(append, str(i))
    assert len(asked) <= 4  # of the first, and of all others: at once, and after a while
    database.dispose()


def test_a_database_that_cannot_be_reached_is_named(home: Path) -> None:
    for url in ("nonsense://x", "sqlite:////nowhere/at/all.db"):
        with pytest.raises(ConfigError, match="database_url"):
            open_database(home, url)
