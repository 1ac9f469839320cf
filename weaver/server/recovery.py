"""`Recovery`: brings a run back from its snapshot and its journal, and takes the snapshots.

Called by the executor when the next operation of a run finds it not loaded: after a restart, after
it was idle, and after its journal could not be written. A loaded run's lock file is held, so that
no other process on this home has it, too.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio import to_thread

from weaver.boundary import attempt, attempt_async, blocking, or_raise
from weaver.errors import EngineError, RunNotFoundError, WeaverError
from weaver.files import hold_lock, release_lock
from weaver.protocol import ForwardBackward, LoadCheckpoint, OptimStep
from weaver.server.checkpoints import Location
from weaver.server.operations import gradient_job
from weaver.server.preflight import OTHER_HOME
from weaver.threads import out_at_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from weaver.engine.base import Engine
    from weaver.server.checkpoints import Checkpoints
    from weaver.server.journal import Journal
    from weaver.server.manifest import Manifest
    from weaver.server.records import Executed, RunRecord
    from weaver.server.runs import Run
    from weaver.server.settings import Durability
    from weaver.types import CheckpointInfo

logger = logging.getLogger(__name__)
T = TypeVar("T")


SHARE = 0.05
"""Of the time that a run has computed since its last snapshot the next one may cost so much."""
REPLAY_S = 300.0
"""What took a run so long to compute is not left to a replay, whatever a snapshot costs."""
SNAPSHOTS_AT_ONCE = 1
"""So many are written at the same time, of all runs: each has a copy of its run in memory."""
UNSAVED_BYTES = 16 * 2**20
"""A run with more in its journal alone is snapshotted after its next step, even one that failed."""
FORGET_S = 1.0
"""How long an ending service waits for the engine to forget a run that did not come back."""
KEEP, KEEP_S = "keep", 86_400.0
"""A file of this name keeps snapshots that are replaced, as deploy/backup.sh wants, for a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Brings runs of `store` back into the engine."""

    engine: Engine
    store: Journal
    checkpoints: Checkpoints
    live: Checkpoints
    """Snapshots, named by the last operation in them; the lock files are beside them."""
    durability: Durability
    _writing: list[Run] = field(default_factory=list)
    """Those whose snapshots are on their way to the disk."""

    async def load(self, run: Run) -> None:
        """Brings the engine to where the run stood after its last finished operation.

        Raises:
            ConflictError: another process has it.
            StorageError, CheckpointCorruptError: the journal or the snapshot is damaged.
            UnknownModelError: the base model is gone.
        """
        try:
            async with run.committing:  # which prunes what the former snapshot needs
                await self.hold(run)
                record = await self.store.run(run.run_id)
                if record is None:
                    raise RunNotFoundError(
                        f"{run.run_id} was deleted.", field="run_id", hint="See list_runs()."
                    )
                record = await adopt(self.store, self.live, run, record)
                done = await self.store.executed(run.run_id, after=record.snapshot)
                or_raise(await attempt_async(self._restore, run, record, done))
        except WeaverError:
            release(run)
            raise

    async def unload(self, run: Run) -> None:
        """Takes it out of the engine; its next operation brings it back."""
        run.loaded = False
        await attempt_async(self.engine.delete_run, run.run_id)
        self._let_go(run)

    def _let_go(self, run: Run) -> None:
        """Lets other processes have a run that is not loaded, once its snapshots are written."""
        if not run.loaded and run not in self._writing:
            release(run)

    async def delete(self, run: Run, *, checkpoints: bool) -> list[str]:
        """Forgets a run that nothing waits for; answers the checkpoints that went with it.

        The checkpoints go first and the files that nobody names last, so that a crash in between
        leaves a run that can be deleted, or none.

        Raises:
            ConflictError: another process has it.
            StorageError
        """
        try:
            async with run.committing:
                await self.hold(run)
                remove = self._delete_checkpoints
                gone = await blocking(remove, run.run_id) if checkpoints else []
                await self.store.delete_run(run.run_id)
                if run.loaded:
                    await self.unload(run)
                await to_thread.run_sync(forget_files, self.live.root / run.run_id)
        finally:
            release(run)
        return gone

    def _delete_checkpoints(self, run_id: str) -> list[str]:
        paths = [info.path for info in self.checkpoints.list(run_id)]
        for path in paths:
            self.checkpoints.delete(path)
        return paths

    async def hold(self, run: Run) -> None:
        """Takes the run's lock, unless nothing outlives this process anyway.

        Raises:
            ConflictError: another process has it.
        """
        if self.store.keeps != "nothing" and run.lock is None:
            run.lock = hold_lock(
                self.live.root / run.run_id, what=f"run {run.run_id}", hint=OTHER_HOME
            )

    def due(self, run: Run, *, at_once: bool) -> bool:
        """Whether a snapshot should be taken, now that a step has ended and no gradient is left.

        Runs share the time of the device, so that what each may cost bounds what all of them cost.
        `at_once` after a checkpoint was loaded, which may be deleted and not be found in a replay.
        """
        enough, unsaved = self.durability, run.unsaved_bytes > UNSAVED_BYTES
        steps, passed_s = run.step - run.snapshot_step, time.monotonic() - run.snapshot_at
        in_turn = steps >= enough.snapshot_every_steps and passed_s >= enough.snapshot_every_s
        earned = run.computed_s * SHARE >= run.snapshot_cost_s or run.computed_s >= REPLAY_S
        in_turn &= earned or not enough.snapshot_every_s
        free = len(self._writing) < SNAPSHOTS_AT_ONCE or not enough.snapshot_every_s
        wanted = free and not run.committing.locked() and (in_turn or unsaved)
        return self.store.keeps != "nothing" and (at_once or wanted)

    async def snapshot(self, run: Run) -> Callable[[], Coroutine[Any, Any, None]] | None:
        """Copies the run, which takes the engine; answers what remains to be done.

        The rest (writing it, waiting for the disk, and pruning the journal) can go on beside it.
        """
        place, last_seqs = str(_place(run, run.executed)), dict(run.last_seqs)
        info = run.checkpoint(place, "weights_and_optimizer", step=run.step)
        saved_bytes, begin = run.unsaved_bytes, time.monotonic()
        run.snapshot_step, run.snapshot_at, run.computed_s = run.step, begin, 0.0
        save = partial(self.engine.save, run.run_id, include_optimizer=True)
        fill = await attempt_async(save)
        if isinstance(fill, WeaverError):
            logger.warning("no snapshot of %s: %s", run.run_id, fill)
            return None
        run.snapshot_cost_s = time.monotonic() - begin
        self._writing.append(run)
        write = partial(self.live.write, info, fill, overwrite=True, last_seqs=last_seqs)
        return partial(self._commit, run, info, write, saved_bytes=saved_bytes)

    async def _commit(
        self,
        run: Run,
        info: CheckpointInfo,
        write: Callable[[], CheckpointInfo],
        *,
        saved_bytes: int,
    ) -> None:
        number = int(info.name)
        work = partial(out_at_exit, partial(attempt, write))
        try:
            async with run.committing:  # one after another: each prunes what the former held
                if run.lock is None:  # it was deleted, or another process may have it
                    return
                begin = time.monotonic()
                done = await to_thread.run_sync(work, abandon_on_cancel=True)
                failure = done if isinstance(done, WeaverError) else None
                if failure is None:
                    failure = await attempt_async(self.store.put_snapshot, run.run_id, number)
                if failure is None:
                    run.unsaved_bytes -= saved_bytes
                    await to_thread.run_sync(attempt, self._prune, run, number)
                else:
                    logger.warning("no snapshot of %s: %s", run.run_id, failure)
                run.snapshot_cost_s += time.monotonic() - begin
        finally:
            self._writing.remove(run)
            self._let_go(run)

    def _prune(self, run: Run, number: int) -> None:
        with suppress(FileNotFoundError):
            if time.time() - (self.live.root / KEEP).stat().st_mtime < KEEP_S:
                return
        for info in self.live.list(run.run_id):
            if info.kind != "sampler" and info.name != str(number):
                self.live.delete(info.path)

    async def _restore(self, run: Run, record: RunRecord, done: Sequence[Executed]) -> None:
        engine, reason = self.engine, None
        await engine.create_run(
            run.run_id,
            run.model.name,
            training_mode=run.training_mode,
            lora_config=run.lora_config,
            seed=run.seed,
        )
        restored, step, begin = False, 0, time.monotonic()
        try:
            if record.snapshot:
                _, folder = await blocking(self.live.open, str(_place(run, record.snapshot)))
                step = await engine.load(run.run_id, folder, include_optimizer=True)
            run.step = run.snapshot_step = step
            for one in done:
                reason = await self._replay(run, one, reason)
            restored, run.computed_s = True, time.monotonic() - begin
        finally:
            if not restored:
                with anyio.move_on_after(FORGET_S, shield=True):
                    await attempt_async(engine.delete_run, run.run_id)
        run.executed = max([record.executed, *(one.number for one in done)])
        run.lane.discard(run.lane.discard_reason or reason)
        run.loaded = True

    async def _replay(self, run: Run, done: Executed, reason: str | None) -> str | None:
        """Does again what changed the run; answers why its gradient must not be applied, if so."""
        engine, operation = self.engine, done.operation
        match operation:
            case ForwardBackward(backward=True):
                if done.error is not None:
                    return f"operation {done.number}: {done.error}"
                [answer] = await engine.forward_backward([gradient_job(run.run_id, operation)])
                if isinstance(answer, WeaverError):
                    raise EngineError(
                        f"{run.run_id} cannot be brought back: its operation {done.number} "
                        f"succeeded before and now fails ({answer}).",
                        hint="Is the base model the same? Else go on from a checkpoint.",
                    )
            case OptimStep(params=params):
                if done.error is None:
                    [taken] = await engine.optim_step([(run.run_id, params)])
                    run.step = int(or_raise(taken).metrics["step"])
                else:  # whatever the reason was, nothing of that batch was left
                    await engine.clear_gradients(run.run_id)
                return None
            case LoadCheckpoint(path=path, include_optimizer=optimizer) if done.error is None:
                _, folder = await blocking(self.checkpoints.open, path)
                run.step = await engine.load(run.run_id, folder, include_optimizer=optimizer)
                return None
        return reason


async def adopt(store: Journal, live: Checkpoints, run: Run, record: RunRecord) -> RunRecord:
    """Lets a run go on from its newest snapshot, where its record names an older one.

    So it is when the machine lost power: the snapshot was on the disk, the last commits were not.
    Nothing that is in the snapshot is executed again.

    Raises:
        StorageError: the database or the folder cannot be read or written.
    """
    newest = await blocking(_newest, live, run.run_id)
    number = 0 if newest is None else int(newest.checkpoint.name)
    if newest is None or number <= record.snapshot:
        return record
    await store.put_snapshot(run.run_id, number)
    for session_id, seq in newest.last_seqs.items():
        run.last_seqs[session_id] = max(seq, run.last_seqs.get(session_id, 0))
    if number > record.executed:
        run.step, run.unsaved_bytes = newest.checkpoint.step, 0
        logger.warning(
            "%s goes on from a snapshot at step %d, which is newer than the database: "
            "outcomes of its last operations are lost",
            run.run_id,
            run.step,
        )
    return replace(record, snapshot=number, executed=max(number, record.executed))


def _newest(live: Checkpoints, run_id: str) -> Manifest | None:
    snapshots = [one for one in live.list(run_id) if one.kind != "sampler" and one.name.isdecimal()]
    newest = max(snapshots, key=lambda one: int(one.name), default=None)
    return None if newest is None else live.manifest(newest.path)


def forget_files(folder: Path) -> None:
    """Removes those of a deleted run; samplers without a name stay with their sessions."""
    shutil.rmtree(folder / "weights", ignore_errors=True)
    (folder / "lock").unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def release(run: Run) -> None:
    """Lets other processes have the run."""
    if run.lock is not None:
        release_lock(run.lock)
        run.lock = None


def _place(run: Run, number: int) -> Location:
    return Location(run.run_id, "weights", str(number))
