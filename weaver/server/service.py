"""`LocalService`: the `Service` protocol over an engine in this process.

The embedded client and the server use it. It is an async context manager: entering starts its
tasks, leaving ends them. It closes neither the engine nor the store; who made them closes them.
"""

from __future__ import annotations

import os
import secrets
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio import CancelScope, CapacityLimiter, to_thread

from weaver.errors import (
    ClosedError,
    NotFoundError,
    RunNotFoundError,
)
from weaver.protocol import SessionInfo
from weaver.server.activity import Activity
from weaver.server.attempt import attempt, or_raise
from weaver.server.checkpoints import Checkpoints, now_utc
from weaver.server.executor import Executor
from weaver.server.exports import Exports
from weaver.server.intake import Intake
from weaver.server.limits import EMBEDDED, Limits
from weaver.server.operations import Operations
from weaver.server.reach import Reach
from weaver.server.recovery import Durability, Recovery, hold_lock, release
from weaver.server.restart import restore
from weaver.server.runs import Run
from weaver.server.sampling import Samplers
from weaver.server.sessions import Session
from weaver.server.store import MemoryStore
from weaver.server.tenancy import OWNER, Caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from anyio.abc import TaskStatus

    from weaver.engine.base import Engine
    from weaver.protocol import Export, Outcome, SessionState, Submission
    from weaver.server.store import Store
    from weaver.types import (
        CheckpointInfo,
        JsonDict,
        MetricPoint,
        ModelInfo,
        SampleDelta,
        TrainingRun,
    )

DURABILITY = Durability()
T = TypeVar("T")


class LocalService:
    """Carries out operations on `engine`, and keeps checkpoints below `home`.

    Args:
        store: the journal; in memory by default.
        deterministic: no result depends on what else runs (gradients of runs are not merged).
        merge_tokens: runs' gradient operations share a pass while they have fewer tokens together.
        gap_timeout_s: how long operations wait for an earlier one that has not come.
        sweep_every_s: how often expired checkpoints are looked for; they are never found after
            their time, swept or not.
        close_timeout_s: how long `aclose` waits for an engine call to end before it leaves the
            call's thread to itself.
        loaded_samplers: the weights that stay ready to sample though they could be loaded again.
        limits: of requests and projects.
        durability: how often runs are snapshotted, if the store outlives this process.
        now: the clock of checkpoints and runs, in UTC.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        home: Path,
        store: Store | None = None,
        deterministic: bool = False,
        merge_tokens: int = 8192,
        gap_timeout_s: float = 60.0,
        sweep_every_s: float = 60.0,
        close_timeout_s: float = 0.1,
        loaded_samplers: int = 16,
        limits: Limits = EMBEDDED,
        durability: Durability = DURABILITY,
        now: Callable[[], datetime] = now_utc,
    ) -> None:
        self._engine = engine
        about = {"description": engine.description, "deterministic": deterministic}
        self._session_info = partial(SessionInfo, **about)
        self._store = MemoryStore() if store is None else store
        self.limits = limits
        self._sweep_every_s = sweep_every_s
        self._close_timeout_s = close_timeout_s
        self._now = now
        self._checkpoints = Checkpoints(home.expanduser(), now=now)
        self._live = Checkpoints(home.expanduser(), folder="live", now=now)
        kept = self._live if self._store.keeps_sessions else None
        self._exports = Exports(engine, self._checkpoints, home=home.expanduser(), now=now)
        self._runs: dict[str, Run] = {}
        self.owners: dict[str, str] = {}
        """The project of each run, of deleted ones too."""
        self._sessions: dict[str, Session] = {}
        self.activity = Activity(self._sessions, self._store)
        self._operations = Operations(
            engine=engine,
            checkpoints=self._checkpoints,
            kept_samplers=kept,
            limits=limits,
            samplers=Samplers(
                engine, self._checkpoints, kept=kept, max_loaded=loaded_samplers, now=now
            ),
            runs=self._runs,
            owners=self.owners,
            now=now,
        )
        self._executor = Executor(
            self._operations,
            self._store,
            recovery=Recovery(
                engine=engine,
                store=self._store,
                checkpoints=self._checkpoints,
                live=self._live,
                durability=durability,
            ),
            merge_tokens=0 if deterministic else merge_tokens,
            activity=self.activity,
        )
        self._models: Sequence[ModelInfo] | None = None
        self._intake = Intake(
            executor=self._executor,
            store=self._store,
            runs=self._runs,
            owners=self.owners,
            sessions=self._sessions,
            limits=limits,
            gap_timeout_s=gap_timeout_s,
            now=now,
        )
        self._closed = True
        self._lock: int | None = None
        self._scope = CancelScope()
        self._ended = anyio.Event()

    # --- lifetime -------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._store.keeps_sessions:
            self._lock = hold_lock(self._live.root, what=f"the home {self._live.root.parent}")
        try:
            restored = await restore(self._store, self._live)
        except BaseException:
            self._unlock()
            raise
        self._runs |= restored.runs
        self.owners |= restored.owners
        self._sessions |= restored.sessions
        self._host = anyio.create_task_group()
        await self._host.__aenter__()
        await self._host.start(self._main)
        self._closed = False
        for ticket in restored.tickets:
            await self._intake.accept(ticket)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        with CancelScope(shield=True):
            await self.aclose()
        if isinstance(exc, Exception):  # the body's own: it leaves as it is, in no group
            await self._host.__aexit__(None, None, None)
            return None
        return await self._host.__aexit__(exc_type, exc, traceback)

    async def _main(self, *, task_status: TaskStatus[None]) -> None:
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(self._executor.run)
                    tasks.start_soon(self._sweep)
                    task_status.started()
        finally:
            self._ended.set()

    async def aclose(self) -> None:
        """Ends all work; operations without an outcome get none. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for session in self._sessions.values():
            session.close()
        self._executor.stop()
        with anyio.move_on_after(self._close_timeout_s):
            await self._executor.call(partial(attempt, self._operations.forget_all))
        self._scope.cancel()
        await self._ended.wait()
        self._unlock()

    def _unlock(self) -> None:
        for run in self._runs.values():
            release(run)
        if self._lock is not None:
            os.close(self._lock)

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(min(self._sweep_every_s, self.limits.session_timeout_s / 2))
            for disk in (self._checkpoints, self._live, self._exports):
                swept = partial(attempt, disk.sweep)
                await to_thread.run_sync(swept, abandon_on_cancel=True)
            await self._intake.close_silent()
            await self._executor.settle()  # what could not be journaled before
            self._executor.unload_idle()

    # --- sessions and operations ----------------------------------------------------------------

    def reach(self, caller: Caller) -> Reach:
        return Reach(caller, self.owners, self._sessions)

    async def open_session(
        self,
        *,
        user_metadata: JsonDict | None = None,
        caller: Caller = OWNER,
        lasting: bool = False,
    ) -> SessionInfo:
        """Its operations have the rights of `caller`; a `lasting` one is never silent for long."""
        self._check_open()
        about: dict[str, Any] = {"lasting": lasting, "user_metadata": user_metadata or {}}
        session = Session(f"session-{secrets.token_hex(6)}", caller, **about)
        await self._store.open_session(session.session_id, caller, **about)
        self._sessions[session.session_id] = session
        return self._session_info(session_id=session.session_id)

    async def close_session(self, session_id: str) -> None:
        await self._intake.close(session_id)

    async def list_sessions(self) -> Sequence[SessionState]:
        return [session.describe() for session in self._sessions.values()]

    async def submit(self, session_id: str, submissions: Sequence[Submission]) -> None:
        session = self._session(session_id)
        await self._intake.take(session, submissions)

    async def collect(self, session_id: str, *, after: int, timeout_s: float) -> Sequence[Outcome]:
        session = self._session(session_id)
        self.forget(session_id, after)
        return await session.collect(after=after, timeout_s=timeout_s)

    def forget(self, session_id: str, cursor: int) -> None:
        """Lets go of the outcomes up to a cursor."""
        forgotten = self._session(session_id).acknowledge(cursor)
        self._store.acknowledge(session_id, forgotten)

    def follow(
        self, session_id: str, follower: Callable[[Outcome], None]
    ) -> tuple[Sequence[Submission], Mapping[str, int]]:
        """See `Session.follow`."""
        return self._session(session_id).follow(follower)

    async def hold_samples(self, session_id: str, sampler_id: str, *, hold: bool) -> None:
        self._executor.hold(self._session(session_id), sampler_id, hold=hold)

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        tickets = self._session(session_id).tickets
        for ticket in [tickets[one] for one in submission_ids if one in tickets]:
            await self._executor.cancel(ticket)

    async def stream(self, session_id: str, submission_id: str) -> AsyncIterator[SampleDelta]:
        async with aclosing(self._session(session_id).stream(submission_id).read()) as pieces:
            async for delta in pieces:
                yield delta

    # --- models, runs, metrics ------------------------------------------------------------------

    async def list_models(self) -> Sequence[ModelInfo]:
        if self._models is None:  # an engine's list is made when the engine is
            self._models = await self._engine_call(self._engine.list_models)
        return self._models

    async def get_model(self, base_model: str) -> ModelInfo:
        for model in await self.list_models():
            if model.name == base_model:
                return model
        return await self._engine_call(partial(self._engine.get_model, base_model))

    async def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return await self._engine_call(partial(self._engine.tokenizer_files, base_model))

    async def list_runs(self) -> Sequence[TrainingRun]:
        return [run.describe() for run in list(self._runs.values())]

    async def get_run(self, run_id: str) -> TrainingRun:
        return (await self._run(run_id)).describe()

    async def stop_run(self, run_id: str) -> TrainingRun:
        run = await self._run(run_id)
        await self._executor.stop_run(run)
        return run.describe()

    async def delete_run(self, run_id: str, *, checkpoints: bool = False) -> None:
        await self._executor.delete_run(await self._run(run_id), checkpoints=checkpoints)

    async def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        now = self._now()
        timed = [p if p.occurred_at else p.model_copy(update={"occurred_at": now}) for p in points]
        await self._run(run_id)
        await self._store.add_metrics(run_id, timed)

    async def read_metrics(self, run_id: str, *, name: str | None = None) -> Sequence[MetricPoint]:
        await self._run(run_id)
        return await self._store.metrics(run_id, name=name)

    # --- checkpoints ----------------------------------------------------------------------------

    async def list_checkpoints(self, run_id: str | None = None) -> Sequence[CheckpointInfo]:
        return await self._disk(partial(self._checkpoints.list, run_id))

    async def get_checkpoint(self, path: str) -> CheckpointInfo:
        return await self._disk(partial(self._checkpoints.get, path))

    async def delete_checkpoint(self, path: str) -> None:
        await self._disk(partial(self._checkpoints.delete, path))
        self._executor.release([path])

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> CheckpointInfo:
        info = await self._disk(partial(self._checkpoints.set_ttl, path, ttl_seconds))
        self._executor.release([path])  # a sampler knows when its weights expire
        return info

    async def export_checkpoint(self, path: str, *, merge: bool = False) -> Export:
        if merge:  # with a name that the engine knows, it merges beside its other work
            await self.get_model((await self.get_checkpoint(path)).base_model)
        describe = partial(self._exports.describe, path, merge=merge)
        return await self._disk(describe, self._exports.merging if merge else None)

    async def read_exported(
        self, path: str, name: str, *, merge: bool = False, offset: int = 0
    ) -> bytes:
        return await self._disk(partial(self._exports.read, path, name, merge=merge, offset=offset))

    # --- helpers --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the service is closed.", hint="Open another one.")

    def _session(self, session_id: str) -> Session:
        self._check_open()
        if session_id not in self._sessions:
            raise NotFoundError(
                f"no session is called {session_id!r}.",
                field="session_id",
                hint="It was closed, or not heard of for too long; open another one.",
            )
        self._sessions[session_id].heard()
        return self._sessions[session_id]

    async def _run(self, run_id: str) -> Run:
        self._check_open()
        if run_id not in self._runs and (record := await self._store.run(run_id)):
            self.owners[run_id] = record.project
            self._runs.setdefault(run_id, Run.of(record))  # another process on this home made it
        if run_id not in self._runs:
            raise RunNotFoundError(
                f"no run is called {run_id!r}.", field="run_id", hint="See list_runs()."
            )
        return self._runs[run_id]

    async def _engine_call(self, work: Callable[[], T]) -> T:
        self._check_open()
        return or_raise(await self._executor.call(partial(attempt, work)))

    async def _disk(self, work: Callable[[], T], limiter: CapacityLimiter | None = None) -> T:
        self._check_open()
        return or_raise(await to_thread.run_sync(partial(attempt, work), limiter=limiter))
