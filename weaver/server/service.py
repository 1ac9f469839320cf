"""`LocalService`: the `Service` protocol over an engine in this process.

The embedded client and the server use it. It is an async context manager: entering starts its
tasks, leaving ends them. It closes neither the engine nor the store; who made them closes them.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope, to_thread

from weaver.boundary import attempt, attempt_async
from weaver.files import hold_lock, release_lock
from weaver.server.activity import Activity
from weaver.server.checkpoints import Checkpoints, now_utc
from weaver.server.executor import Executor
from weaver.server.exports import Exports
from weaver.server.imports import Imports
from weaver.server.intake import Intake
from weaver.server.journal import Journal
from weaver.server.keys import OWNER
from weaver.server.operations import Operations
from weaver.server.outcomes import Outcomes
from weaver.server.parts import Parts
from weaver.server.preflight import LIVE, OTHER_HOME
from weaver.server.recovery import Recovery, release
from weaver.server.registry import Registry
from weaver.server.restart import restore
from weaver.server.sampling import Samplers
from weaver.server.settings import DURABILITY, EMBEDDED, Durability, Limits
from weaver.server.view import View

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    from anyio.abc import TaskStatus

    from weaver.engine.base import Engine


logger = logging.getLogger(__name__)


class LocalService:
    """Carries out operations on `engine`, and keeps checkpoints below `home`.

    Entering it answers the view of its owner, who sees everything.

    Args:
        store: the journal; in memory by default.
        deterministic: no result depends on what else runs (gradients of runs are not merged).
        merge_tokens: runs' gradient operations share a pass while they have fewer tokens together.
        gap_timeout_s: how long operations wait for an earlier one that has not come.
        sweep_every_s: how often expired checkpoints are looked for; they are never found after
            their time, swept or not.
        close_timeout_s: how long `aclose` waits for the engine, to end what has begun and then to
            forget it.
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
        store: Journal | None = None,
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
        store, home, registry = store or Journal(), home.expanduser(), Registry()
        checkpoints, live, merged = (
            Checkpoints(home, folder=folder, now=now) for folder in ("runs", LIVE, "merged")
        )
        kept = live if store.keeps == "everything" else None
        samplers = Samplers(engine, checkpoints, kept, max_loaded=loaded_samplers, now=now)
        self._operations = Operations(
            engine=engine,
            checkpoints=checkpoints,
            kept_samplers=kept,
            limits=limits,
            samplers=samplers,
            registry=registry,
            now=now,
        )
        recovery = Recovery(
            engine=engine, store=store, checkpoints=checkpoints, live=live, durability=durability
        )
        activity = Activity(registry)
        outcomes = Outcomes(recovery, runs=registry.runs, activity=activity)
        tokens = 0 if deterministic else merge_tokens
        executor = Executor(self._operations, recovery, outcomes=outcomes, merge_tokens=tokens)
        intake = Intake(
            executor,
            store,
            registry,
            limits,
            gap_timeout_s,
            now,
            samplers.prepare,
            engine.max_tokens_trained,
        )
        self._parts = Parts(
            engine=engine,
            store=store,
            checkpoints=checkpoints,
            live=live,
            exports=Exports(engine=engine, checkpoints=checkpoints, merged=merged),
            imports=Imports(
                engine=engine,
                checkpoints=checkpoints,
                root=home / "imports",
                limits=limits,
                check_stored=self._operations.check_stored,
            ),
            executor=executor,
            intake=intake,
            registry=registry,
            activity=activity,
            limits=limits,
            deterministic=deterministic,
            now=now,
        )
        self._sweep_every_s = sweep_every_s
        self._close_timeout_s = close_timeout_s
        self._lock: int | None = None
        self._scope = CancelScope()
        self._ended = anyio.Event()

    # --- lifetime -------------------------------------------------------------------------------

    async def __aenter__(self) -> View:
        parts, host = self._parts, anyio.create_task_group()
        async with AsyncExitStack() as stack:
            stack.callback(self._unlock)
            if parts.store.keeps == "everything":
                self._lock = hold_lock(
                    parts.live.root, what=f"the home {parts.live.root.parent}", hint=OTHER_HOME
                )
            tickets = await restore(parts.store, parts.live, parts.registry)
            self._host = await host.__aenter__()
            stack.push_async_exit(self.__aexit__)
            await self._host.start(self._main)
            parts.closed = False
            for ticket in tickets:
                await parts.intake.accept(ticket)
            stack.pop_all()
        return View(parts, OWNER, close=self.aclose)

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
                    await tasks.start(self._parts.executor.run)
                    tasks.start_soon(self._sweep)
                    task_status.started()
        finally:
            self._ended.set()

    async def aclose(self) -> None:
        """Ends all work; operations without an outcome get none. May be called twice."""
        parts = self._parts
        if parts.closed:
            return
        parts.closed = True
        for session in parts.registry.sessions.values():
            session.close()
        deadline = anyio.current_time() + self._close_timeout_s
        with CancelScope(deadline=deadline):
            await parts.executor.stop()
        self._scope.cancel()
        await self._ended.wait()
        with CancelScope(deadline=deadline):
            await attempt_async(self._operations.forget_all)
        self._unlock()

    def _unlock(self) -> None:
        for run in self._parts.registry.runs.values():
            release(run)
        if self._lock is not None:
            release_lock(self._lock)
            self._lock = None

    async def _sweep(self) -> None:
        parts = self._parts
        disks = parts.checkpoints, parts.live, parts.exports, parts.imports
        while True:
            for disk in disks:
                await to_thread.run_sync(attempt, disk.sweep, abandon_on_cancel=True)
            told, freed = parts.activity.freed_bytes, sum(disk.freed_bytes for disk in disks)
            if freed > told:
                logger.info("%d bytes freed of what expired or was left half written", freed - told)
            parts.activity.freed_bytes = freed
            await anyio.sleep(min(self._sweep_every_s, parts.limits.session_timeout_s / 2))
            await parts.intake.close_silent()
            await parts.executor.settle()  # what could not be journaled before
            await parts.executor.unload_idle()
