"""`ThreadedEngine`: an `Engine` made of a trainer and a sampler that block and share one device.

The base of `TorchEngine`. One thread calls the parts, one call at a time, so that they need no
lock. While both sides have work they get the same share of its time.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlparse

from anyio.lowlevel import current_token

from weaver.boundary import attempt
from weaver.engine.base import SampleProgress, WeightsRef
from weaver.engine.fair_share import FairShare
from weaver.engine.status import EngineStatus
from weaver.errors import ClosedError, NotFoundError, WeaverError
from weaver.threads import Call, call_soon, out_at_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from weaver import types
    from weaver.engine.base import GradientJob, SampleJob
    from weaver.engine.blocking import BlockingSampler, BlockingTrainer, WeightSnapshot

T = TypeVar("T")
IDLE_S = 10.0
"""The thread ends when nothing was asked of it for so long."""
PATIENCE_S = 0.01
"""How long the device waits for the next call of a trainer whose turn it is."""


@dataclass(slots=True, eq=False)
class Asked:
    """A call of the trainer."""

    run: Callable[[], None]
    base_model: str | None
    """What has to be in memory for it."""
    since: float = field(default_factory=time.monotonic)


class _Told:
    """Who is told of a job, through the event loop that has begun it."""

    def __init__(self, job_id: str, tell: Callable[[SampleProgress], None]) -> None:
        self.job_id = job_id
        self.loop = current_token().native_token
        self.over = False
        """The job has ended or was dropped; the event loop's own."""
        self._tell = tell

    def hear(self, progress: SampleProgress) -> None:
        if not self.over:
            self.over = _is_last(progress)
            self._tell(progress)


class ThreadedEngine:
    """Owns one device through `trainer` and `sampler`, which nobody else calls meanwhile.

    A caller that is cancelled does not wait for the thread: its call is dropped unless it has
    begun, and then goes on to its end.
    """

    status = EngineStatus()

    def __init__(self, trainer: BlockingTrainer, sampler: BlockingSampler) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self._lock = threading.Condition()
        """Around all that follows."""
        self._thread: threading.Thread | None = None
        self._training: deque[Asked] = deque()
        self._sampling: deque[Callable[[], None]] = deque()
        self._arriving: list[Callable[[], None]] = []
        """On the event loop, the next of `_sampling`."""
        self._arriving_on: object = None
        """The loop that will hand them over."""
        self._closed = False
        self._share = FairShare()
        self._trained_at = -math.inf
        self._posts: dict[Any, list[Callable[[], None]]] = {}
        """By event loop, what is to be called there at the end of a turn. The thread's own, as are
        the next two."""
        self._told: dict[str, _Told] = {}
        self._snapshots: dict[str, tuple[str, WeightSnapshot]] = {}
        """By run, the newest and its uri."""
        self._chosen: Asked
        """The trainer's call whose turn it is."""
        self._count = 0
        self._bases: dict[str, str] = {}
        """The base model of each run that shares one."""

    @property
    def counts(self) -> Mapping[str, int]:
        """See the protocol; an engine has its own."""
        return {}

    @property
    def gauges(self) -> Mapping[str, float]:
        """The same."""
        return {}

    @property
    def loaded_models(self) -> Collection[str]:
        """The same."""
        return ()

    # --- training -------------------------------------------------------------------------------

    def lane(self, run_id: str, base_model: str) -> str:
        return ""

    async def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: types.TrainingMode,
        lora_config: types.LoraConfig | None,
        seed: int,
    ) -> None:
        create = partial(self.trainer.create_run, run_id, base_model, training_mode=training_mode)
        shared = base_model if training_mode == "lora" else None
        await self._train(partial(create, lora_config=lora_config, seed=seed), base_model=shared)
        if shared is not None:
            self._bases[run_id] = shared

    async def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[types.ForwardBackwardResult | WeaverError]:
        base_model = self._bases.get(jobs[0].run_id) if jobs else None
        forward_backward = partial(self.trainer.forward_backward, jobs)
        return await self._train(forward_backward, base_model=base_model)

    async def optim_step(
        self, steps: Sequence[tuple[str, types.AdamParams]]
    ) -> Sequence[types.OptimStepResult | WeaverError]:
        take = self.trainer.optim_step
        return await self._train(lambda: [attempt(take, run_id, how) for run_id, how in steps])

    async def clear_gradients(self, run_id: str) -> None:
        await self._train(partial(self.trainer.clear_gradients, run_id))

    async def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        save = partial(self.trainer.save, run_id, include_optimizer=include_optimizer)
        return await self._train(save)

    async def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> int:
        def load() -> int:
            self.trainer.load(run_id, folder, include_optimizer=include_optimizer)
            return self.trainer.step(run_id)

        return await self._train(load)

    async def snapshot(self, run_id: str) -> WeightsRef:
        def take() -> WeightsRef:
            snapshot = self.trainer.snapshot(run_id)
            self._count += 1
            uri = f"mem:{self._count}"
            self._snapshots[run_id] = uri, snapshot
            return WeightsRef(base_model=snapshot.base_model, version=snapshot.version, uri=uri)

        return await self._train(take)

    async def delete_run(self, run_id: str) -> None:
        def delete() -> None:
            self._snapshots.pop(run_id, None)
            self.trainer.delete_run(run_id)

        self._bases.pop(run_id, None)
        await self._train(delete)

    # --- sampling -------------------------------------------------------------------------------

    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        def publish() -> int:
            if ref.uri is None or ref.uri.startswith("file:"):
                folder = ref.uri and Path(unquote(urlparse(ref.uri).path))
                return self.sampler.load(weights_id, ref.base_model, folder or None)
            for run_id, (uri, snapshot) in self._snapshots.items():
                if uri == ref.uri:
                    del self._snapshots[run_id]
                    self.sampler.publish(weights_id, snapshot)
                    return snapshot.version
            raise NotFoundError(f"the engine has no weights {ref.uri}.", field="uri")

        return await self._call(self._put_sampling, publish)

    async def release(self, weights_id: str) -> None:
        await self._call(self._put_sampling, partial(self.sampler.release, weights_id))

    def sample(self, job: SampleJob, tell: Callable[[SampleProgress], None]) -> Callable[[], None]:
        told = _Told(job.job_id, tell)
        self._put_sampling(partial(out_at_exit, partial(self._add, job, told)))
        return partial(self._drop, told)

    def _drop(self, told: _Told) -> None:
        if not told.over:
            told.over = True
            with suppress(ClosedError):
                self._put_sampling(partial(out_at_exit, partial(self._cancel, told)))

    def _add(self, job: SampleJob, told: _Told) -> None:
        self._told[job.job_id] = told
        refused = attempt(self.sampler.add, job)
        if refused is not None:
            self._tell(SampleProgress(job_id=job.job_id, error=refused))

    def _cancel(self, told: _Told) -> None:
        if self._told.get(told.job_id) is told:
            del self._told[told.job_id]
            attempt(self.sampler.cancel, told.job_id)

    def _tell(self, progress: SampleProgress) -> None:
        if (told := self._told.get(progress.job_id)) is not None:
            if _is_last(progress):
                del self._told[progress.job_id]
            self._post(told.loop, partial(told.hear, progress))

    def _step(self) -> None:
        stepped = attempt(self.sampler.step)
        if isinstance(stepped, WeaverError):  # nobody knows whose fault it was, or what is left
            for job_id in list(self._told):
                attempt(self.sampler.cancel, job_id)
                self._tell(SampleProgress(job_id=job_id, error=stepped))
        else:
            for progress in stepped:
                self._tell(progress)

    # --- the thread -----------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the thread behind what was asked of it, and forgets everything."""
        with self._lock:
            alone, self._closed = self._thread is None, True
            self._lock.notify()
        if alone:
            self._forget()

    def _forget(self) -> None:
        """Lets go of what the parts hold; an engine adds its own."""
        self._snapshots.clear()

    def _delay_s(self, base_model: str, since: float) -> float:
        """How long a call that needs a base model since then has to wait; 0: it may begin.

        Asked before each turn; an engine that has not all of its models in memory says its own, as
        the next. It may end earlier, as `_wake` tells, or the sampler's being busy no more.
        """
        return 0.0

    @property
    def _samples_delay_s(self) -> float | None:
        """The same of samples that wait in the sampler; None where none does."""
        return None

    @property
    def asked(self) -> list[Asked]:
        """The trainer's calls that have not begun."""
        return list(self._training)

    def _wake(self) -> None:
        """Looks again at what waits; may be called in any thread."""
        with self._lock:
            self._lock.notify()

    async def _train(self, work: Callable[[], T], *, base_model: str | None = None) -> T:
        def begin() -> T:
            if base_model is not None and self._closed and self._delay_s(base_model, math.inf):
                raise ClosedError("the engine is closed.")
            return work()

        def put(call: Callable[[], None]) -> None:
            self._put(self._training, Asked(call, base_model))

        return await self._call(put, begin)

    async def _call(self, put: Callable[[Callable[[], None]], None], work: Callable[[], T]) -> T:
        """What `work` returns or raises in the engine's thread."""
        call = Call(work)

        def run() -> None:
            if call.run():
                self._post(call.loop, call.tell)

        put(run)
        return await call.wait()

    def _post(self, loop: object, call: Callable[[], None]) -> None:
        self._posts.setdefault(loop, []).append(call)

    def _put_sampling(self, call: Callable[[], None]) -> None:
        """Together with what else the event loop puts in without a pause.

        So the thread begins jobs at the same step that were asked for at once, and the same jobs
        make the same batches, however quick it is.
        """
        self._check_open()
        self._arriving.append(call)
        loop = current_token().native_token
        if self._arriving_on is not loop:
            self._arriving_on = loop
            call_soon(loop, self._arrive)

    def _arrive(self) -> None:
        arrived, self._arriving, self._arriving_on = self._arriving, [], None
        if arrived:
            with suppress(ClosedError):
                self._put(self._sampling, *arrived)

    def _put(self, queue: deque[T], *calls: T) -> None:
        with self._lock:
            self._check_open()
            queue.extend(calls)
            self._lock.notify()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="weaver-engine", daemon=True
                )
                self._thread.start()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed.")

    def _work(self) -> None:
        """Until nothing was asked for a while, or the engine is closed."""
        while (side := self._next()) is not None:
            begin = time.perf_counter()
            if side == "trainer":
                self._chosen.run()
                self._trained_at = time.monotonic()
            else:
                while self._sampling:
                    self._sampling.popleft()()
                if self.sampler.busy and not self._closed:
                    out_at_exit(self._step)
            self._share.charge(side, time.perf_counter() - begin)
            posts, self._posts = self._posts, {}
            for loop, calls in posts.items():
                call_soon(loop, partial(_all, calls))
        if self._closed:
            out_at_exit(self._forget)

    def _next(self) -> str | None:
        """Whose turn it is, once there is something that can begin; None ends the thread."""
        with self._lock:
            if self._share.trainer_is_next:
                left_s = self._trained_at + PATIENCE_S - time.monotonic()
                self._lock.wait_for(lambda: self._training or self._closed, max(0.0, left_s))
            while True:
                chosen, delay_s = self._first()
                side = self._share.choose(
                    trainer=chosen is not None,
                    sampler=bool(self._sampling) or (self.sampler.busy and not self._closed),
                )
                if side == "trainer" and chosen is not None:
                    self._training.remove(chosen)
                    self._chosen = chosen
                if side is not None:
                    return side
                samples_s = None if self._closed else self._samples_delay_s
                waits_s = min(IDLE_S, delay_s, IDLE_S if samples_s is None else samples_s)
                asked = not self._closed and self._lock.wait(waits_s)
                if not (asked or self._training or self._sampling or samples_s is not None):
                    self._thread = None
                    return None

    def _first(self) -> tuple[Asked | None, float]:
        """The first call of the trainer that may begin; else the seconds until one may."""
        delay_s = math.inf
        for asked in self._training:
            wait_s = 0.0
            if asked.base_model is not None and not self._closed:
                wait_s = self._delay_s(asked.base_model, asked.since)
            if not wait_s:
                return asked, 0.0
            delay_s = min(delay_s, wait_s)
        return None, delay_s


def _is_last(progress: SampleProgress) -> bool:
    return progress.result is not None or progress.error is not None


def _all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
