"""`ScopedService`: a `LocalService` as a caller may see it from afar; behind every HTTP request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver.protocol import CheckpointLoaded, CheckpointSaved

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from weaver.protocol import Export, Outcome, SessionInfo, SessionState, Submission
    from weaver.server.service import LocalService
    from weaver.server.tenancy import Caller
    from weaver.types import (
        CheckpointInfo,
        JsonDict,
        MetricPoint,
        ModelInfo,
        SampleDelta,
        TrainingRun,
    )


class ScopedService:
    """The `Service` protocol. Folders of the server's machine are neither opened nor told.

    What an operation names is checked by the service itself, as what its session's caller may do.
    """

    def __init__(self, service: LocalService, caller: Caller) -> None:
        self._service = service
        self._caller = caller
        self._reach = service.reach(caller)

    async def open_session(
        self, *, user_metadata: JsonDict | None = None, lasting: bool = False
    ) -> SessionInfo:
        return await self._service.open_session(
            user_metadata=user_metadata, caller=self._caller, lasting=lasting
        )

    async def close_session(self, session_id: str) -> None:
        self._reach.check_session(session_id)
        await self._service.close_session(session_id)

    async def list_sessions(self) -> Sequence[SessionState]:
        sessions = await self._service.list_sessions()
        return [one for one in sessions if self._reach.has_session(one.session_id)]

    async def submit(self, session_id: str, submissions: Sequence[Submission]) -> None:
        self._reach.check_session(session_id)
        await self._service.submit(session_id, submissions)

    async def collect(self, session_id: str, *, after: int, timeout_s: float) -> Sequence[Outcome]:
        self._reach.check_session(session_id)
        outcomes = await self._service.collect(session_id, after=after, timeout_s=timeout_s)
        return [_told(outcome) for outcome in outcomes]

    def lasting_session(self) -> str | None:
        """That which an earlier process has opened for the same caller."""
        return self._reach.lasting_session()

    def forget(self, session_id: str, cursor: int) -> None:
        self._reach.check_session(session_id)
        self._service.forget(session_id, cursor)

    def follow(
        self, session_id: str, follower: Callable[[Outcome], None]
    ) -> tuple[Sequence[Submission], Mapping[str, int]]:
        """With folders of this machine in the outcomes, which are not for the caller."""
        self._reach.check_session(session_id)
        return self._service.follow(session_id, follower)

    async def hold_samples(self, session_id: str, sampler_id: str, *, hold: bool) -> None:
        self._reach.check_session(session_id)
        await self._service.hold_samples(session_id, sampler_id, hold=hold)

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        self._reach.check_session(session_id)
        await self._service.cancel(session_id, submission_ids)

    def stream(self, session_id: str, submission_id: str) -> AsyncIterator[SampleDelta]:
        self._reach.check_session(session_id)
        return self._service.stream(session_id, submission_id)

    async def list_models(self) -> Sequence[ModelInfo]:
        return await self._service.list_models()

    async def get_model(self, base_model: str) -> ModelInfo:
        return await self._service.get_model(base_model)

    async def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return await self._service.tokenizer_files(base_model)

    async def list_runs(self) -> Sequence[TrainingRun]:
        runs = await self._service.list_runs()
        return [run for run in runs if self._reach.has_run(run.run_id)]

    async def get_run(self, run_id: str) -> TrainingRun:
        self._reach.check_run(run_id)
        return await self._service.get_run(run_id)

    async def stop_run(self, run_id: str) -> TrainingRun:
        self._reach.check_run(run_id)
        return await self._service.stop_run(run_id)

    async def delete_run(self, run_id: str, *, checkpoints: bool = False) -> None:
        self._reach.check_run(run_id)
        await self._service.delete_run(run_id, checkpoints=checkpoints)

    async def list_checkpoints(self, run_id: str | None = None) -> Sequence[CheckpointInfo]:
        if run_id is not None:
            self._reach.check_run(run_id)
        checkpoints = await self._service.list_checkpoints(run_id)
        return [_bare(c) for c in checkpoints if self._reach.has_run(c.run_id)]

    async def get_checkpoint(self, path: str) -> CheckpointInfo:
        self._reach.check_path(path)
        return _bare(await self._service.get_checkpoint(path))

    async def export_checkpoint(self, path: str, *, merge: bool = False) -> Export:
        """Its folder is for the server itself: callers are never told."""
        self._reach.check_path(path)
        return await self._service.export_checkpoint(path, merge=merge)

    async def read_exported(
        self, path: str, name: str, *, merge: bool = False, offset: int = 0
    ) -> bytes:
        self._reach.check_path(path)
        return await self._service.read_exported(path, name, merge=merge, offset=offset)

    async def delete_checkpoint(self, path: str) -> None:
        self._reach.check_path(path)
        await self._service.delete_checkpoint(path)

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> CheckpointInfo:
        self._reach.check_path(path)
        return _bare(await self._service.set_checkpoint_ttl(path, ttl_seconds))

    async def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        self._reach.check_run(run_id)
        await self._service.log_metrics(run_id, points)

    async def read_metrics(self, run_id: str, *, name: str | None = None) -> Sequence[MetricPoint]:
        self._reach.check_run(run_id)
        return await self._service.read_metrics(run_id, name=name)

    async def aclose(self) -> None:
        """Nothing: the service is its server's."""


def _told(outcome: Outcome) -> Outcome:
    match outcome.result:
        case CheckpointSaved() | CheckpointLoaded() as result:
            bare = result.model_copy(update={"checkpoint": _bare(result.checkpoint)})
            return outcome.model_copy(update={"result": bare})
    return outcome


def _bare(checkpoint: CheckpointInfo) -> CheckpointInfo:
    return checkpoint.model_copy(update={"folder": None})
