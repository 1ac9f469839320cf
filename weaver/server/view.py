"""`View`: the service as one caller may see it; behind every HTTP request and embedded client.

What an operation names is checked when it is accepted, as what its session's caller may do.
"""

from __future__ import annotations

import secrets
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from weaver import types
from weaver.boundary import blocking
from weaver.errors import ClosedError, NotFoundError
from weaver.protocol import SessionInfo
from weaver.server.afar import bare, told
from weaver.server.imports import run_of
from weaver.server.records import SessionRecord
from weaver.server.registry import Access, no_run
from weaver.server.runs import Run
from weaver.server.sessions import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from anyio import CapacityLimiter

    from weaver.exchange import Export, Import, Selection
    from weaver.protocol import Outcome, SessionState, Submission
    from weaver.server.keys import Caller
    from weaver.server.parts import Parts
    from weaver.server.streams import SampleStream

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
CARD_POINTS = 1000
"""Of the metrics that a run has logged last, the card of its model has the newest of each name."""


class View:
    """The `Service` protocol. Only a caller in this process may name its folders, and is told."""

    def __init__(
        self,
        parts: Parts,
        caller: Caller,
        *,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.parts = parts
        self._close = close
        self._caller = caller
        self._access = Access(caller, parts.registry)

    def seen_by(self, caller: Caller) -> View:
        """The same service as somebody else sees it."""
        return View(self.parts, caller)

    async def aclose(self) -> None:
        """Ends the service, if this is its owner's view."""
        if self._close is not None:
            await self._close()

    # --- sessions and operations ----------------------------------------------------------------

    async def open_session(
        self,
        *,
        user_metadata: types.JsonDict | None = None,
        lasting: bool = False,
        key: str | None = None,
    ) -> SessionInfo:
        """A `lasting` one is never silent for too long; the same `key` names the same one."""
        self._check_open()
        parts, name = self.parts, key[:12] if key else secrets.token_hex(6)
        parts.limits.check_metadata(user_metadata or {})
        record = SessionRecord(f"session-{name}", self._caller, lasting, user_metadata or {})
        sessions = parts.registry.sessions
        async with parts.opening:
            if record.session_id not in sessions and not await self._was_done(key):
                if not lasting:
                    mine = parts.registry.sessions_of(self._caller.project)
                    parts.limits.check_sessions(sum(not one.lasting for one in mine))
                await parts.store.open_session(record)
                sessions[record.session_id] = Session.of(record)
                await self._keep(key)
        return SessionInfo(
            session_id=record.session_id,
            description=parts.engine.description,
            deterministic=parts.deterministic,
        )

    async def close_session(self, session_id: str, *, key: str | None = None) -> None:
        async with self._once(key):
            if not self._caller.local:  # for whom one that was closed is as one that never was
                self._access.check_session(session_id)
            await self.parts.intake.close(session_id)

    async def list_sessions(self) -> Sequence[SessionState]:
        sessions = self.parts.registry.sessions
        return [one.describe() for id, one in sessions.items() if self._access.has_session(id)]

    def lasting_session(self) -> str | None:
        """That which an earlier process has opened for the same caller."""
        return self._access.lasting_session()

    async def submit(self, session_id: str, submissions: Sequence[Submission]) -> None:
        await self.parts.intake.take(self._session(session_id), submissions)

    async def collect(self, session_id: str, *, after: int, timeout_s: float) -> Sequence[Outcome]:
        session = self._session(session_id)
        self.forget(session_id, after)
        outcomes = await session.collect(after=after, timeout_s=timeout_s)
        return outcomes if self._caller.local else [told(outcome) for outcome in outcomes]

    def forget(self, session_id: str, cursor: int) -> None:
        """Lets go of the outcomes up to a cursor."""
        forgotten = self._session(session_id).acknowledge(cursor)
        self.parts.store.acknowledge(session_id, forgotten)

    def follow(
        self, session_id: str, follower: Callable[[Outcome], None]
    ) -> tuple[Sequence[Submission], Mapping[str, int]]:
        """See `Session.follow`. Folders of this machine are in the outcomes, whoever asks."""
        return self._session(session_id).follow(follower)

    def hear(self, session_id: str) -> Mapping[str, str]:
        """Notes that the session's client lives; answers the names that were given in it.

        Raises:
            NotFoundError, ClosedError: it has ended.
        """
        return self._session(session_id).names

    async def name(self, session_id: str, name: str, value: str) -> None:
        """Gives a name, durably, that the session knows from then on; the first value stays."""
        session = self._session(session_id)
        async with session.submitting:
            if name not in session.names:
                await self.parts.store.name(session_id, name, value)
                session.names[name] = value

    async def hold_samples(self, session_id: str, sampler_id: str, *, hold: bool) -> None:
        self.parts.executor.hold(self._session(session_id), sampler_id, hold=hold)

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        tickets = self._session(session_id).tickets
        mine = [tickets[one] for one in submission_ids if one in tickets]
        await self.parts.executor.cancel(*mine)

    def stream(self, session_id: str, submission_id: str) -> AsyncIterator[types.SampleDelta]:
        return self.sample_stream(session_id, submission_id).each()

    def sample_stream(self, session_id: str, submission_id: str) -> SampleStream:
        return self._session(session_id).stream(submission_id)

    # --- models, runs, metrics ------------------------------------------------------------------

    async def list_models(self) -> Sequence[types.ModelInfo]:
        if self.parts.models is None:
            self.parts.models = await self._disk(self.parts.engine.list_models)
        loaded = self.parts.engine.loaded_models
        return [m.model_copy(update={"loaded": m.name in loaded}) for m in self.parts.models]

    async def get_model(self, base_model: str) -> types.ModelInfo:
        await self.list_models()
        for model in self.parts.models or ():
            if model.name == base_model:
                return model
        return await self._disk(self.parts.engine.get_model, base_model)

    async def tokenizer(self, base_model: str) -> Any | None:
        return await self._disk(partial(self.parts.engine.tokenizer, base_model))

    async def encode(
        self,
        base_model: str,
        prompt: str | Sequence[types.Message],
        *,
        tools: Sequence[types.JsonDict] = (),
    ) -> list[int]:
        """See `Engine.encode`; of a project one text at a time, beside whatever else runs."""
        await self.get_model(base_model)
        limiter = self.parts.intake.preparing[self._caller.project]
        encode = partial(self.parts.engine.encode, base_model, prompt, tools=tools)
        return await self._disk(encode, limiter=limiter)

    async def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return await self._disk(self.parts.engine.tokenizer_files, base_model)

    async def list_runs(self) -> Sequence[types.TrainingRun]:
        runs = list(self.parts.registry.runs.values())
        busy = self.parts.executor.sampled_runs()
        return [
            run.describe(sampled=run.run_id in busy)
            for run in runs
            if self._access.has_run(run.run_id)
        ]

    async def get_run(self, run_id: str) -> types.TrainingRun:
        run = await self._run(run_id)
        return run.describe(sampled=run_id in self.parts.executor.sampled_runs())

    async def rename_run(self, run_id: str, name: str) -> types.TrainingRun:
        run = await self._run(run_id)
        run.name = await self.parts.store.rename_run(run.describe(), name)
        return await self.get_run(run_id)

    async def stop_run(self, run_id: str) -> types.TrainingRun:
        run = await self._run(run_id)
        await self.parts.executor.stop_run(run)
        return run.describe()

    async def delete_run(
        self, run_id: str, *, checkpoints: bool = False, key: str | None = None
    ) -> None:
        async with self._once(key):
            run = await self._run(run_id)
            await self.parts.executor.delete_run(run, checkpoints=checkpoints)

    async def log_metrics(
        self, run_id: str, points: Sequence[types.MetricPoint], *, key: str | None = None
    ) -> None:
        """Nothing, if it was done for the same `key` before."""
        run, parts = await self._run(run_id), self.parts
        if run.metric_counts is None:
            counted = Counter(await parts.store.metric_counts(run_id))
            if run.metric_counts is None:  # no other request was quicker
                run.metric_counts = counted
        counts, new = run.metric_counts, Counter(point.name for point in points)
        parts.limits.check_metrics(
            names=len(counts.keys() | new.keys()), points=counts.total() + new.total()
        )
        now = parts.now()
        timed = [p if p.occurred_at else p.model_copy(update={"occurred_at": now}) for p in points]
        await parts.store.add_metrics(run_id, timed, key=key)
        counts.update(new)

    async def read_metrics(
        self, run_id: str, *, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> Sequence[types.MetricPoint]:
        await self._run(run_id)
        return await self.parts.store.metrics(run_id, name=name, offset=offset, limit=limit)

    async def rewind_metrics(self, run_id: str, step: int) -> None:
        run = await self._run(run_id)
        await self.parts.store.rewind_metrics(run_id, logged=step, computed=run.step)
        run.metric_counts = None

    # --- checkpoints ----------------------------------------------------------------------------

    async def list_checkpoints(self, run_id: str | None = None) -> Sequence[types.CheckpointInfo]:
        if run_id is not None:
            self._access.check_run(run_id)
        found = await self._disk(self.parts.checkpoints.list, run_id)
        return [self._shown(info) for info in found if self._access.has_run(info.run_id)]

    async def get_checkpoint(self, path: str) -> types.CheckpointInfo:
        self._access.check_path(path)
        return self._shown(await self._disk(self.parts.checkpoints.look_up, path))

    async def delete_checkpoint(self, path: str, *, key: str | None = None) -> None:
        async with self._once(key):
            self._access.check_path(path)
            await self._disk(self.parts.checkpoints.delete, path)
            self.parts.executor.release([path])

    async def delete_checkpoints(
        self, which: Selection, *, dry_run: bool = False
    ) -> Sequence[types.CheckpointInfo]:
        """One that cannot be deleted is logged, and is not in the answer."""
        which.check()
        now = self.parts.now()
        known = await self.list_checkpoints(which.run_id)
        chosen = [info for info in known if which.fits(info, now=now)]
        if dry_run:
            return chosen
        gone = await self._disk(self.parts.checkpoints.delete_all, [one.path for one in chosen])
        self.parts.executor.release(gone)
        return [info for info in chosen if info.path in gone]

    async def set_checkpoint_ttl(
        self, path: str, ttl_seconds: int | None, *, key: str | None = None
    ) -> types.CheckpointInfo:
        self._access.check_path(path)
        if await self._was_done(key):
            return await self.get_checkpoint(path)
        info = await self._disk(self.parts.checkpoints.set_ttl, path, ttl_seconds)
        self.parts.executor.release([path])  # a sampler knows when its weights expire
        await self._keep(key)
        return self._shown(info)

    async def export_checkpoint(self, path: str, *, merge: bool = False) -> Export:
        """Its folder is for the server itself: callers from afar are never told."""
        exports = self.parts.exports
        self._access.check_path(path)
        describe = partial(exports.describe, path, merge=merge)
        if not merge:
            return await self._disk(describe)
        info = await self.get_checkpoint(path)
        await self.get_model(info.base_model)  # whose name the engine knows from then on
        run = self.parts.registry.runs.get(info.run_id)
        points = await self.parts.store.last_metrics(info.run_id, CARD_POINTS)
        metrics = {p.name: p.value for p in points if p.step is None or p.step <= info.step}
        known = partial(describe, metadata=run.user_metadata if run else {}, metrics=metrics)
        return await self._disk(known, limiter=exports.merging)

    async def read_exported(
        self, path: str, name: str, *, merge: bool = False, offset: int = 0
    ) -> bytes:
        self._access.check_path(path)
        read = partial(self.parts.exports.read, path, name, merge=merge, offset=offset)
        return await self._disk(read)

    async def put_import(self, import_id: str, name: str, data: bytes, *, offset: int) -> None:
        put = partial(self.parts.imports.put, self._caller.project, import_id, name, data)
        await self._disk(partial(put, offset=offset))

    async def import_checkpoint(self, import_id: str, what: Import) -> types.CheckpointInfo:
        """Its owner is written down first, so that nobody else sees it in between."""
        parts, project, run_id = self.parts, self._caller.project, run_of(import_id)
        if run_id not in parts.registry.owners:
            parts.imports.find(project, import_id)
            await parts.store.put_owner(run_id, project)
            parts.registry.owners[run_id] = project
        self._access.check_run(run_id)
        if what.base_model is not None:
            await self.get_model(what.base_model)
        finish = partial(parts.imports.finish, project, import_id, what)
        return self._shown(await self._disk(finish, limiter=parts.exports.merging))

    async def drop_import(self, import_id: str) -> None:
        await self._disk(self.parts.imports.drop, self._caller.project, import_id)

    # --- requests that may come again -----------------------------------------------------------
    # A key has at most 64 characters, and one request at a time.

    async def _was_done(self, key: str | None) -> bool:
        return key is not None and await self.parts.store.knows_request(key)

    async def _keep(self, key: str | None) -> None:
        if key is not None:
            await self.parts.store.keep_request(key)

    @asynccontextmanager
    async def _once(self, key: str | None) -> AsyncIterator[None]:
        """Around a removal: what its resend does not find has been removed."""
        again = await self._was_done(key)
        if not again:  # before, as this process may end in its midst
            await self._keep(key)
        try:
            yield
        except NotFoundError:
            if again:
                return
            if key is not None:
                await self.parts.store.drop_request(key)
            raise

    # --- helpers --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.parts.closed:
            raise ClosedError("the service is closed.", hint="Open another one.")

    def _session(self, session_id: str) -> Session:
        self._check_open()
        self._access.check_session(session_id)
        session = self.parts.registry.sessions[session_id]
        session.heard()
        return session

    async def _run(self, run_id: str) -> Run:
        self._check_open()
        self._access.check_run(run_id)
        runs = self.parts.registry.runs
        if run_id not in runs and (record := await self.parts.store.run(run_id)):
            self.parts.registry.owners[run_id] = record.run.project
            runs.setdefault(run_id, Run.of(record))  # another process on this home made it
        if run_id not in runs:
            raise no_run(run_id)
        return runs[run_id]

    async def _disk(
        self, work: Callable[[*Ts], T], *args: *Ts, limiter: CapacityLimiter | None = None
    ) -> T:
        self._check_open()
        return await blocking(work, *args, limiter=limiter)

    def _shown(self, checkpoint: types.CheckpointInfo) -> types.CheckpointInfo:
        return checkpoint if self._caller.local else bare(checkpoint)
