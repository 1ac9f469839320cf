"""`SamplerPool`: a `Sampler` whose samples are drawn by workers, of one base model.

`PooledEngine` has one for each base model beside any trainer. A thread of its own has the event
loop on which workers are started, asked and heard, so that it may be used from any other, and all
that follows from a job is in one place: its turn, its worker, its repetition when that has died.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlparse

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.lowlevel import current_token

from weaver.boundary import attempt_async, blocking
from weaver.engine.base import SampleProgress
from weaver.engine.cluster.place import Facts, Place, no_worker
from weaver.engine.cluster.router import Turns, choose
from weaver.engine.cluster.sample_run import Listener, SampleRun, no_weights
from weaver.engine.cluster.sampled_model import SampledModel
from weaver.engine.cluster.vllm_params import check_job
from weaver.engine.cluster.weights import Adapter, Shelf, Weights
from weaver.engine.cluster.worker_process import Opener, WorkerLostError
from weaver.errors import (
    CheckpointMismatchError,
    ClosedError,
    EngineError,
    WeaverError,
)
from weaver.threads import call_soon

if TYPE_CHECKING:
    from weaver.engine.base import SampleJob, WeightsRef
    from weaver.types import SampleResult

T = TypeVar("T")

LOAD_S = 120.0
"""In which a worker has loaded an adapter."""
TRIES = 3
"""Workers that may die of a job, or beside it, before it fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a pool holds and could."""

    workers: int
    """That run."""
    rows: int
    """Samples that they draw at once."""
    free_rows: int
    tokens: int
    """Of keys and values."""
    waiting: int
    """Jobs that have no worker yet."""
    faults: tuple[str, ...] = ()
    """Why workers do not run."""


class SamplerPool:
    """
    Args:
        workers: how each is started, by its name.
        start: of the first frame for each: vLLM's arguments.
        versions: of packages that each must have.
        shelf: a folder that all workers see; closed with the pool.
        check: of a folder's weights, before workers load them: raises what is wrong with them.
    """

    def __init__(
        self,
        model: SampledModel,
        workers: Mapping[str, Opener],
        *,
        start: Mapping[str, Any],
        shelf: Shelf,
        max_rank: int,
        versions: Mapping[str, str] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.model = model
        self.max_rank = max_rank
        self._shelf = shelf
        self._check = check
        self.places: Mapping[str, Place] = {
            name: Place(name, opener, start=start, versions=versions or {}, changed=self._on_change)
            for name, opener in workers.items()
        }
        self._lock = threading.Lock()
        """Around the next two."""
        self._portal: BlockingPortal | None = None
        self._closed = False
        self._stack = ExitStack()
        self._loop: object = None
        self._weights: dict[str, Weights] = {}
        """From here on, the thread's own."""
        self._count = 0
        self._turns: Turns[SampleRun] = Turns()
        self._changed: anyio.Event | None = None
        self._counts = {"prompt_tokens": 0, "reused_prompt_tokens": 0, "repeated_samples": 0}

    @property
    def counts(self) -> Mapping[str, int]:
        """See `Engine`; and `repeated_samples` after a worker's death, `worker_starts`."""
        starts = sum(place.starts for place in self.places.values())
        return {**self._counts, "worker_starts": starts}

    def room(self) -> Room:
        """As it is now."""
        places = list(self.places.values())
        up = [(place, facts) for place in places if (facts := place.facts) is not None]
        return Room(
            workers=len(up),
            rows=sum(facts.rows for _, facts in up),
            free_rows=sum(max(0, facts.rows - place.load) for place, facts in up),
            tokens=sum(facts.tokens for _, facts in up),
            waiting=len(self._turns),
            faults=tuple(f"{p.name}: {p.fault}" for p in places if p.fault is not None),
        )

    # --- Sampler --------------------------------------------------------------------------------

    async def ready(self) -> Facts:
        """What a worker says of itself; starts them, the first time.

        Raises:
            EngineError: none can be started, and why.
        """
        facts = (await self._call(self._any)).facts
        assert facts is not None
        return facts

    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        """See `Sampler`; `ref` is of a folder or the base model.

        Raises:
            CheckpointMismatchError: the rank or the layers are none that the workers take.
            UnsupportedError: the folder holds a whole model.
            EngineError: no worker can be started, or several have died of it.
        """
        return await self._call(partial(self._publish, weights_id, ref))

    async def release(self, weights_id: str) -> None:
        await self._call(partial(self._release, weights_id))

    def sample(self, job: SampleJob, tell: Callable[[SampleProgress], None]) -> Callable[[], None]:
        listener = Listener(tell)
        self._open().start_task_soon(self._begin, job, listener)

        def drop() -> None:
            listener.leave()
            call_soon(self._loop, partial(_drop, listener))

        return drop

    def close(self) -> None:
        """Ends the workers, and with them what they draw; waits for that."""
        with self._lock:
            self._closed, portal = True, self._portal
        if portal is not None:
            portal.call(partial(portal.stop, cancel_remaining=True))
            self._stack.close()
        self._shelf.close()

    # --- between the threads --------------------------------------------------------------------

    def _open(self) -> BlockingPortal:
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed.")
            if self._portal is None:
                portal = start_blocking_portal(name="weaver-sampler-pool")
                self._portal = self._stack.enter_context(portal)
                self._loop = self._portal.call(lambda: current_token().native_token)
                self._portal.start_task_soon(self._keep)
            return self._portal

    async def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        """What it answers or raises in the pool's thread, where it goes on if this is cancelled."""
        future = self._open().start_task_soon(work)
        loop, done = current_token().native_token, anyio.Event()
        future.add_done_callback(lambda _: call_soon(loop, done.set))
        await done.wait()
        if future.cancelled():
            raise ClosedError("the engine was closed meanwhile.")
        return future.result()

    # --- in the pool's thread -------------------------------------------------------------------

    async def _keep(self) -> None:
        async with anyio.create_task_group() as group:
            for place in self.places.values():
                group.start_soon(place.keep)

    def _on_change(self) -> None:
        """A worker has come, gone, or could not be started."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        if faults := self._faults():
            for run in self._turns.drain():
                run.fail(no_worker(faults))
        self._admit()

    def _faults(self) -> Mapping[str, str]:
        """Why there is no worker, unless there is one, or one may come at once."""
        faults = {p.name: p.fault for p in self.places.values() if p.fault is not None}
        return faults if len(faults) == len(self.places) else {}

    async def _any(self) -> Place:
        """One with a worker, the least loaded; a start has a deadline, at which this ends too."""
        while True:
            up = [place for place in self.places.values() if place.facts is not None]
            if up:
                return min(up, key=lambda place: place.load)
            if faults := self._faults():
                raise no_worker(faults)
            self._changed = self._changed or anyio.Event()
            await self._changed.wait()

    async def _publish(self, weights_id: str, ref: WeightsRef) -> int:
        place = await self._any()
        facts = place.facts
        assert facts is not None
        self._count += 1
        if ref.uri is None:
            weights = Weights("", self._count, None, ref.version, users=1)
        else:
            source = Path(unquote(urlparse(ref.uri).path))
            folder, version = await blocking(self._take, source, facts)
            weights = Weights(folder.name, self._count, folder, version or ref.version, users=1)
            try:
                await self._load(weights, place)
            except (WorkerLostError, EngineError) as error:
                await self._put_away(weights)
                raise _not_loaded(source, error) from error
        self._weights[weights_id] = weights
        return weights.version

    async def _load(self, weights: Weights, place: Place) -> None:
        """Has a worker read an adapter, and another if that dies.

        Raises:
            WorkerLostError, EngineError
        """
        for _ in range(TRIES - 1):
            try:
                return await place.ask("load", LOAD_S, adapter=weights.adapter)
            except WorkerLostError:
                place = await self._any()
        await place.ask("load", LOAD_S, adapter=weights.adapter)

    def _take(self, source: Path, facts: Facts) -> tuple[Path, int]:
        """A folder of the pool's own, and the step of its weights."""
        adapter = Adapter.read(source)
        adapter.check(max_rank=self.max_rank, modules=facts.modules)
        self._check(source)
        return self._shelf.take(source), adapter.version

    async def _release(self, weights_id: str) -> None:
        weights = self._weights.pop(weights_id, None)
        if weights is not None:
            await self._let_go(weights)

    async def _let_go(self, weights: Weights) -> None:
        """One user less; the last puts them away."""
        weights.users -= 1
        if not weights.users:
            await self._put_away(weights)

    async def _put_away(self, weights: Weights) -> None:
        if weights.folder is not None:
            for place in self.places.values():
                place.post({"do": "forget", "number": weights.number})
            with anyio.CancelScope(shield=True):
                await blocking(self._shelf.drop, weights.folder)

    # --- a job ----------------------------------------------------------------------------------

    async def _begin(self, job: SampleJob, listener: Listener) -> None:
        """From its beginning to its end, or until it is dropped."""
        with anyio.CancelScope() as listener.scope:
            if not listener.dropped:
                outcome = await attempt_async(self._carry_out, job, listener)
                error = outcome if isinstance(outcome, WeaverError) else None
                result = None if isinstance(outcome, WeaverError) else outcome
                listener.hear(SampleProgress(job_id=job.job_id, result=result, error=error))

    async def _carry_out(self, job: SampleJob, listener: Listener) -> SampleResult:
        weights = self._weights.get(job.weights_id)
        if weights is None:
            raise no_weights(job.weights_id)
        weights.users += 1
        try:
            run = SampleRun(job, weights, model=self.model, listener=listener)
            await self._draw(run)
            self._counts["prompt_tokens"] += len(job.prompt)
            self._counts["reused_prompt_tokens"] += run.cached
            return run.result()
        finally:
            await self._let_go(weights)

    async def _draw(self, run: SampleRun) -> None:
        """Has a worker draw it, and another if that dies."""
        for attempt in range(TRIES):
            place = await self._placed(run, first=attempt > 0)
            if place is None:
                return
            try:
                if place.facts is not None:
                    check_job(run.job, both=place.facts.both)
                place.send(run)
                await run.done.wait()
            finally:
                place.end(run)
                self._turns.end(run.job.tenant, rows=run.rows)
                self._admit()
            if run.error is not None or run.lost is None:
                return
            self._counts["repeated_samples"] += run.job.num_samples
        run.fail(
            EngineError(
                f"{TRIES} workers of the sampler have died while it was drawn; {run.lost}",
                hint="Sample again; if it comes again, with fewer samples or a shorter prompt.",
            )
        )

    async def _placed(self, run: SampleRun, *, first: bool) -> Place | None:
        """Waits for its turn and a worker with room; None: it has failed meanwhile."""
        run.worker, run.placed = None, anyio.Event()
        if faults := self._faults():
            raise no_worker(faults)
        self._turns.add(run.job.tenant, run, first=first)
        self._admit()
        try:
            await run.placed.wait()
        except anyio.get_cancelled_exc_class():
            self._turns.remove(run.job.tenant, run)
            if run.worker is not None:
                self.places[run.worker].end(run)
                self._turns.end(run.job.tenant, rows=run.rows)
            self._admit()
            raise
        return None if run.worker is None else self.places[run.worker]

    def _admit(self) -> None:
        """Gives workers to those whose turn it is, up to the first for whom none has room."""
        while (run := self._turns.next()) is not None:
            loads = {p.name: p.load for p in self.places.values() if p.facts is not None}
            has_room = partial(self._has_room, rows=run.rows)
            name = choose(run.key, loads, has_room=has_room)
            if name is None:
                return
            self._turns.begin(run.job.tenant, rows=run.rows)
            run.worker = name
            self.places[name].begin(run)
            run.placed.set()

    def _has_room(self, name: str, *, rows: int) -> bool:
        return self.places[name].has_room(rows)


def _drop(listener: Listener) -> None:
    listener.dropped = True
    if listener.scope is not None:
        listener.scope.cancel()


def _not_loaded(source: Path, error: Exception) -> WeaverError:
    if isinstance(error, WorkerLostError):
        return EngineError(
            f"a worker of the sampler has died while it loaded {source.name}: {error}",
            hint="It is started again; the other weights are there.",
        )
    return CheckpointMismatchError(
        f"{source.name} cannot be loaded by the sampler: {error}",
        field="model_path",
        hint="Train other layers, or sample with torch.",
    )
