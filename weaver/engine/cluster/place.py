"""`Place`: where a pool has a worker, which is started again whenever it has ended.

The pool gives it the jobs' frames; what the worker says goes to the jobs. Belongs to the pool's
thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio

from weaver.engine.cluster.worker_process import Frame, Link, Opener, WorkerLostError
from weaver.errors import EngineError, WeaverError

if TYPE_CHECKING:
    from weaver.engine.cluster.sample_run import SampleRun

logger = logging.getLogger(__name__)

START_S = 600.0
"""In which a worker has loaded its model."""
BEAT_S, ANSWER_S = 10.0, 120.0
"""How often a worker is asked whether it still turns, and in which it has answered: between two of
its steps."""
STEADY_S = 30.0
"""A worker that ran for less is started again after a while, which doubles up to `PAUSE_S`."""
PAUSE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a worker has said of itself."""

    rows: int
    """Samples at once."""
    tokens: int
    """Of keys and values."""
    modules: frozenset[str]
    """The last parts of the names of layers that adapters can change."""
    both: bool
    """It tells log-probabilities before and after temperature and filters."""

    @classmethod
    def of(cls, frame: Frame, *, versions: Mapping[str, str]) -> Facts:
        """Raises WorkerLostError: it is not what was asked for."""
        if frame["say"] == "died":
            raise WorkerLostError(frame["error"])
        for name, wanted in versions.items():
            if (found := frame["versions"][name]) != wanted:
                raise WorkerLostError(
                    f"it has {name} {found}, not {wanted}; `weaver cluster install-sampler` makes "
                    "its environment"
                )
        both, modules = frame["both"], frozenset(frame["modules"])
        return cls(rows=frame["rows"], tokens=frame["tokens"], modules=modules, both=both)


class Place:
    """
    Args:
        start: the first frame for a worker.
        versions: of packages, which it must have.
        changed: called when a worker has come, gone, or could not be started.
    """

    def __init__(
        self,
        name: str,
        opener: Opener,
        *,
        start: Mapping[str, Any],
        versions: Mapping[str, str],
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.facts: Facts | None = None
        """Of the worker that runs."""
        self.fault: str | None = None
        """Why none could be started, the last time."""
        self.last_loss: str | None = None
        """Why the last one has ended."""
        self.starts = 0
        self.since = time.time()
        """When the worker that runs was ready, or the last one had ended."""
        self.memory_bytes = 0
        """Of main memory, as the worker said the last time."""
        self.load = 0
        """Rows."""
        self._runs: dict[int, SampleRun] = {}
        """By their numbers, each used once: a worker may still speak of what it was to stop."""
        self._opener = opener
        self._start = {"do": "start", **start, "packages": list(versions)}
        self._versions = versions
        self._changed = changed
        self._out: deque[Mapping[str, Any]] = deque()
        self._some: anyio.Event
        """Set once there is something to be written; made in the pool's own event loop."""
        self._asks: dict[int, _Ask] = {}
        self._numbers = count(1)

    def has_room(self, rows: int) -> bool:
        """For a job; one that is larger than a worker has it for itself."""
        return self.facts is not None and (not self.load or self.load + rows <= self.facts.rows)

    def begin(self, run: SampleRun) -> None:
        run.number = next(self._numbers)
        self._runs[run.number] = run
        self.load += run.rows

    def send(self, run: SampleRun) -> None:
        """Has the worker draw what `begin` made room for, unless that worker is gone."""
        if self._runs.get(run.number) is run:
            self.post(run.begin())
        else:
            run.lose("it has ended")

    def end(self, run: SampleRun) -> None:
        """Gives back its room; the worker draws no more of it."""
        if self._runs.get(run.number) is run:
            del self._runs[run.number]
            self.load -= run.rows
            if run.error is not None or not run.done.is_set():
                self.post({"do": "stop", "job": run.number})

    def post(self, frame: Mapping[str, Any]) -> None:
        """Says something to the worker, if there is one."""
        if self.facts is not None:
            self._out.append(frame)
            self._some.set()

    async def ask(self, do: str, within_s: float, **values: Any) -> None:
        """Waits until the worker has done something.

        Raises:
            WorkerLostError: it has ended, or not answered in time.
            EngineError: what it says why it cannot.
        """
        if self.facts is None:
            raise WorkerLostError("it has ended")
        number, ask = next(self._numbers), _Ask()
        self._asks[number] = ask
        self.post({"do": do, **values, "ask": number})
        try:
            with anyio.fail_after(within_s):
                await ask.answered.wait()
        except TimeoutError:
            raise WorkerLostError(f"it has not answered `{do}` for {within_s:.0f} s") from None
        finally:
            del self._asks[number]
        if ask.lost is not None:
            raise WorkerLostError(ask.lost)
        if ask.error is not None:
            raise EngineError(ask.error)

    async def keep(self) -> None:
        """Has a worker there, for ever."""
        failures = 0
        while True:
            why, began = "", time.monotonic()
            try:
                self.starts += 1
                await self._serve()
            except* WorkerLostError as lost:
                why = str(_first(lost))
            failures = 0 if time.monotonic() - began > STEADY_S else failures + 1
            logger.warning("the sampler's worker %s is gone: %s", self.name, why)
            self._lose(why)
            if failures:
                await anyio.sleep(min(PAUSE_S, 2.0 ** (failures - 1)))

    async def _serve(self) -> None:
        """Until the worker has ended, which it raises."""
        async with self._opener() as link:
            try:
                with anyio.fail_after(START_S):
                    await link.send(self._start)
                    with _understanding():
                        facts = Facts.of(await link.receive(), versions=self._versions)
            except TimeoutError:
                raise WorkerLostError(f"it was not ready in {START_S:.0f} s") from None
            self._some = anyio.Event()
            self.facts, self.fault, self.since = facts, None, time.time()
            logger.info("the sampler's worker %s draws %d rows at once", self.name, facts.rows)
            self._changed()
            async with anyio.create_task_group() as group:
                group.start_soon(self._write, link)
                group.start_soon(self._beat)
                while True:
                    frame = await link.receive()
                    with _understanding():
                        self._hear(frame)

    async def _write(self, link: Link) -> None:
        while True:
            await self._some.wait()
            self._some = anyio.Event()
            while self._out:
                await link.send(self._out.popleft())

    async def _beat(self) -> None:
        while True:
            try:
                await self.ask("ping", ANSWER_S)
            except EngineError as error:
                raise WorkerLostError(error.message) from None
            await anyio.sleep(BEAT_S)

    def _hear(self, frame: Frame) -> None:
        say = frame["say"]
        if say == "rows":
            for number, index, *drawn in frame["rows"]:
                run = self._runs.get(number)
                if run is not None and run.take(index, *drawn):
                    self.post({"do": "stop", "job": number, "index": index})
        elif say == "answer":
            self.memory_bytes = int(frame.get("memory", self.memory_bytes))
            if (ask := self._asks.get(frame["ask"])) is not None:
                ask.end(error=frame.get("error"))
        elif say == "failed":
            if (run := self._runs.get(frame["job"])) is not None:
                run.fail(EngineError(f"the sampler's worker: {frame['error']}"))
        else:
            raise WorkerLostError(frame.get("error", say))

    def _lose(self, why: str) -> None:
        if self.facts is None:
            self.fault = why
        self.last_loss, self.since = why, time.time()
        self.facts, self.load, self.memory_bytes = None, 0, 0
        self._out.clear()
        runs, self._runs = list(self._runs.values()), {}
        for run in runs:
            run.lose(why)
        for ask in self._asks.values():
            ask.end(lost=why)
        self._changed()


class _Ask:
    """What a worker was asked, until it has answered."""

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.error: str | None = None
        self.lost: str | None = None

    def end(self, *, error: str | None = None, lost: str | None = None) -> None:
        self.error, self.lost = error, lost
        self.answered.set()


@contextmanager
def _understanding() -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise WorkerLostError(f"what it said is not understood: {error!r}") from error


def no_worker(faults: Mapping[str, str]) -> WeaverError:
    """That no worker can be started, and why."""
    why = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    return EngineError(
        f"no sampler's worker can be started. {why}",
        hint="`weaver doctor` looks at their environment; they are tried again meanwhile.",
    )


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
