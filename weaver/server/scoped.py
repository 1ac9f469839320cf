"""`ScopedService`: a service as one project may see it from afar; behind every HTTP request.

What belongs to another project is not found, word for word as what does not exist. Folders of the
server's machine cannot be named, only models that it serves. Quotas hold here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.errors import (
    CheckpointNotFoundError,
    NotFoundError,
    QuotaExceededError,
    RunNotFoundError,
    TooLargeError,
    WeaverError,
)
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    CreateModel,
    ErrorInfo,
    ForwardBackward,
    LoadCheckpoint,
    ModelCreated,
    OpenSampler,
    Sample,
    SaveCheckpoint,
)
from weaver.server.served import Served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from weaver.protocol import Outcome, SessionInfo, SessionState, Submission
    from weaver.server.keys import Caller
    from weaver.server.owners import Owners
    from weaver.server.service import LocalService
    from weaver.types import (
        CheckpointInfo,
        JsonDict,
        MetricPoint,
        ModelInfo,
        SampleDelta,
        TrainingRun,
    )

SCHEME = "weaver://"
BASE_SAMPLER = "base:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What one project may hold at a time; None is without a limit."""

    pending_operations: int = 16_384
    runs: int | None = None
    tokens_per_operation: int = 2**22
    stored_bytes: int | None = None


NO_QUOTAS = Quotas()


class Scopes:
    """One view for each project and role."""

    def __init__(
        self, service: LocalService, owners: Owners, *, quotas: Quotas = NO_QUOTAS
    ) -> None:
        self._service = service
        self._served = Served(service)
        self.owners = owners
        self._quotas = quotas
        self._views: dict[Caller, ScopedService] = {}

    def scoped(self, caller: Caller) -> ScopedService:
        view = self._views.get(caller)
        if view is None:
            view = self._views[caller] = ScopedService(
                self._service,
                caller,
                served=self._served,
                owners=self.owners,
                quotas=self._quotas,
            )
        return view


class ScopedService:
    """The `Service` protocol. An admin's view finds everything and creates in its own project.

    An operation that may not be carried out is submitted as a withdrawn one, so that it takes its
    place in the run's order, and its outcome is then told in other words.
    """

    def __init__(
        self,
        service: LocalService,
        caller: Caller,
        *,
        served: Served,
        owners: Owners,
        quotas: Quotas,
    ) -> None:
        self._served = served
        self._service = service
        self._project = caller.project
        self._admin = caller.admin
        self._owners = owners
        self._quotas = quotas
        self._refused: defaultdict[str, dict[str, ErrorInfo]] = defaultdict(dict)
        self._pending: defaultdict[str, set[str]] = defaultdict(set)

    # --- sessions and operations ----------------------------------------------------------------

    async def open_session(self, *, user_metadata: JsonDict | None = None) -> SessionInfo:
        info = await self._service.open_session(user_metadata=user_metadata)
        await self._owners.claim(f"session/{info.session_id}", self._project)
        return info

    async def close_session(self, session_id: str) -> None:
        await self._check_session(session_id)
        await self._service.close_session(session_id)
        await self._owners.forget(f"session/{session_id}")
        self._refused.pop(session_id, None)
        self._pending.pop(session_id, None)

    async def list_sessions(self) -> Sequence[SessionState]:
        sessions = await self._service.list_sessions()
        return [s for s in sessions if await self._owns(f"session/{s.session_id}")]

    async def submit(self, session_id: str, submissions: Sequence[Submission]) -> None:
        await self._check_session(session_id)
        pending = self._pending[session_id]
        new = {submission.id for submission in submissions} - pending
        total = sum(map(len, self._pending.values())) + len(new)
        if new and total > self._quotas.pending_operations:
            raise QuotaExceededError(
                f"{total} operations would be pending, the limit of a project is "
                f"{self._quotas.pending_operations}.",
                hint="Collect results before sending more.",
            )
        checked = [await self._admitted(session_id, submission) for submission in submissions]
        await self._service.submit(session_id, checked)
        pending |= new

    async def collect(
        self, session_id: str, *, after: int, timeout_s: float, forget: int | None = None
    ) -> Sequence[Outcome]:
        await self._check_session(session_id)
        outcomes = await self._service.collect(
            session_id, after=after, timeout_s=timeout_s, forget=forget
        )
        return [await self._told(session_id, outcome) for outcome in outcomes]

    async def standing(self, session_id: str) -> tuple[Sequence[Submission], Mapping[str, int]]:
        await self._check_session(session_id)
        return await self._service.standing(session_id)

    async def hold_samples(self, session_id: str, sampler_id: str, *, hold: bool) -> None:
        await self._check_session(session_id)
        await self._service.hold_samples(session_id, sampler_id, hold=hold)

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        await self._check_session(session_id)
        await self._service.cancel(session_id, submission_ids)

    async def stream(self, session_id: str, submission_id: str) -> AsyncIterator[SampleDelta]:
        await self._check_session(session_id)
        if refused := self._refused.get(session_id, {}).get(submission_id):
            raise refused.to_error()
        async for delta in self._service.stream(session_id, submission_id):
            yield delta

    # --- models ---------------------------------------------------------------------------------

    async def list_models(self) -> Sequence[ModelInfo]:
        return await self._served.all()

    async def get_model(self, base_model: str) -> ModelInfo:
        return await self._served.get(base_model)

    async def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        await self._served.get(base_model)
        return await self._service.tokenizer_files(base_model)

    # --- runs, checkpoints, metrics -------------------------------------------------------------

    async def list_runs(self) -> Sequence[TrainingRun]:
        runs = await self._service.list_runs()
        mine = await self._my_runs()
        return [run for run in runs if mine is None or run.run_id in mine]

    async def get_run(self, run_id: str) -> TrainingRun:
        await self._check_run(run_id)
        return await self._service.get_run(run_id)

    async def stop_run(self, run_id: str) -> TrainingRun:
        await self._check_run(run_id)
        return await self._service.stop_run(run_id)

    async def delete_run(self, run_id: str, *, checkpoints: bool = False) -> None:
        """Its project stays known: checkpoints may remain, and no other run gets its id."""
        await self._check_run(run_id)
        await self._service.delete_run(run_id, checkpoints=checkpoints)

    async def list_checkpoints(self, run_id: str | None = None) -> Sequence[CheckpointInfo]:
        if run_id is not None:
            await self._check_run(run_id)
        checkpoints = await self._service.list_checkpoints(run_id)
        mine = await self._my_runs()
        return [_without_folder(c) for c in checkpoints if mine is None or c.run_id in mine]

    async def get_checkpoint(self, path: str) -> CheckpointInfo:
        await self._check_path(path)
        return _without_folder(await self._service.get_checkpoint(path))

    async def checkpoint_folder(self, path: str) -> Path:
        """Where its files lie, for the server itself: callers are never told.

        Raises:
            CheckpointNotFoundError
        """
        await self._check_path(path)
        folder = (await self._service.get_checkpoint(path)).folder
        assert folder is not None, "the service is of this process"
        return Path(folder)

    async def delete_checkpoint(self, path: str) -> None:
        await self._check_path(path)
        await self._service.delete_checkpoint(path)

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> CheckpointInfo:
        await self._check_path(path)
        return _without_folder(await self._service.set_checkpoint_ttl(path, ttl_seconds))

    async def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        await self._check_run(run_id)
        await self._service.log_metrics(run_id, points)

    async def read_metrics(self, run_id: str, *, name: str | None = None) -> Sequence[MetricPoint]:
        await self._check_run(run_id)
        return await self._service.read_metrics(run_id, name=name)

    async def aclose(self) -> None:
        """Nothing: the service is its server's."""

    # --- what may be done -----------------------------------------------------------------------

    async def _admitted(self, session_id: str, submission: Submission) -> Submission:
        """The submission, or in its place one that does nothing; its outcome will say why."""
        changes: dict[str, object] = {}
        try:
            if submission.run_id is not None:
                changes["run_id"] = f"{submission.run_id}/"  # the name of no run
                await self._check_run(submission.run_id)
                del changes["run_id"]
            await self._check_operation(submission)
        except WeaverError as error:
            self._refused[session_id][submission.id] = ErrorInfo.of(error)
            operation = submission.operation
            lost = isinstance(operation, ForwardBackward) and operation.backward
            changes |= {"operation": None, "lost_gradient": lost or submission.lost_gradient}
            return submission.model_copy(update=changes)
        return submission

    async def _check_operation(self, submission: Submission) -> None:
        match submission.operation:
            case CreateModel(base_model=name):
                await self._served.get(name)
                await self._check_run_quota()
            case ForwardBackward(datums=datums):
                self._check_tokens(sum(datum.model_input.length for datum in datums))
            case SaveCheckpoint():
                await self._check_storage_quota()
            case LoadCheckpoint(path=path):
                await self._check_path(path)
            case OpenSampler(base_model=base_model, model_path=path):
                if base_model is not None:
                    await self._served.get(base_model)
                if path is not None:
                    await self._check_path(path)
            case Sample(sampler_id=sampler_id) as sample:
                await self._check_sampler(sampler_id)
                self._check_tokens(sample.num_samples * sample.params.max_tokens)

    async def _told(self, session_id: str, outcome: Outcome) -> Outcome:
        """The outcome in the caller's words; what it brings belongs to the caller from now on."""
        self._pending[session_id].discard(outcome.submission_id)
        if refused := self._refused.get(session_id, {}).get(outcome.submission_id):
            return outcome.model_copy(update={"result": None, "error": refused})
        match outcome.result:
            case ModelCreated(run=run):
                await self._owners.claim(f"run/{run.run_id}", self._project)
            case CheckpointSaved() | CheckpointLoaded() as result:
                bare = _without_folder(result.checkpoint)
                result = result.model_copy(update={"checkpoint": bare})
                return outcome.model_copy(update={"result": result})
        return outcome

    async def _check_session(self, session_id: str) -> None:
        if not await self._owns(f"session/{session_id}"):
            raise NotFoundError(
                f"no session is called {session_id[:80]!r}.",
                field="session_id",
                hint="It was closed, or the server was started anew; open another one.",
            )

    async def _check_run(self, run_id: str) -> None:
        if not await self._owns(f"run/{run_id}"):
            raise RunNotFoundError(
                f"no run is called {run_id[:80]!r}.", field="run_id", hint="See list_runs()."
            )

    async def _check_path(self, path: str) -> None:
        if not path.startswith(SCHEME):
            raise CheckpointNotFoundError(
                f"{path[:200]!r} is not on this server.",
                field="path",
                hint="Folders are not opened over the network; use a weaver:// path.",
            )
        run_id = path.removeprefix(SCHEME).partition("/")[0]
        if not await self._owns(f"run/{run_id}"):
            raise CheckpointNotFoundError(
                f"{path[:200]} does not exist.", field="path", hint="See list_checkpoints()."
            )

    async def _check_sampler(self, sampler_id: str) -> None:
        if sampler_id.startswith(BASE_SAMPLER):
            await self._served.get(sampler_id.removeprefix(BASE_SAMPLER))
        elif sampler_id.startswith(SCHEME):
            await self._check_path(sampler_id)
        else:
            raise NotFoundError(
                f"no sampler is called {sampler_id[:80]!r}.",
                field="sampler_id",
                hint="Open one with OpenSampler.",
            )

    async def _check_run_quota(self) -> None:
        limit = self._quotas.runs
        if limit is None:
            return
        mine = await self._owners.all_of(self._project, prefix="run/")
        if sum(run.run_id in mine for run in await self._service.list_runs()) >= limit:
            raise QuotaExceededError(
                f"the project has {limit} runs, which is its limit.", hint="Ask an administrator."
            )

    async def _check_storage_quota(self) -> None:
        limit = self._quotas.stored_bytes
        if limit is None:
            return
        mine = await self._owners.all_of(self._project, prefix="run/")
        checkpoints = await self._service.list_checkpoints()
        stored = sum(c.size_bytes for c in checkpoints if c.run_id in mine)
        if stored >= limit:
            raise QuotaExceededError(
                f"the project's checkpoints have {stored} bytes, the limit is {limit}.",
                hint="Delete some, or give them a time to live.",
            )

    def _check_tokens(self, tokens: int) -> None:
        limit = self._quotas.tokens_per_operation
        if tokens > limit:
            raise TooLargeError(
                f"the operation has {tokens} tokens, the limit is {limit}.", hint="Split it."
            )

    async def _owns(self, resource: str) -> bool:
        return self._admin or await self._owners.of(resource) == self._project

    async def _my_runs(self) -> frozenset[str] | None:
        """The project's runs; None for an admin, who sees all."""
        if self._admin:
            return None
        return frozenset(await self._owners.all_of(self._project, prefix="run/"))


def _without_folder(checkpoint: CheckpointInfo) -> CheckpointInfo:
    return checkpoint.model_copy(update={"folder": None})
