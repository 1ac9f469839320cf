"""Samplers' workers that take modelled time, behind the real pool: each is a `Link`.

What they draw follows from the seeds alone; how long they take, from the rows that they draw side
by side, the prompts that they have read before and the adapters that they hold.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import OrderedDict, deque
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

from tests.fake_engine.model import EOS, ByteTokenizer
from tests.simulate.costs import UNIT, Costs, Shared, Streams, add
from tests.simulate.groups import MODEL
from weaver.engine.cluster.pool import SamplerPool
from weaver.engine.cluster.sampled_model import SampledModel
from weaver.engine.cluster.weights import CONFIG
from weaver.engine.cluster.worker_process import WorkerLostError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from weaver.engine.cluster.place import Place
    from weaver.engine.cluster.sample_run import SampleRun
    from weaver.engine.cluster.worker_process import Frame, Opener

SAMPLED = SampledModel(
    name=MODEL.name,
    source=MODEL.name,
    context_length=MODEL.context_length,
    head="lm_head",
    read_tokenizer=ByteTokenizer,
    read_ends=lambda: frozenset([EOS]),
)
QUANTILES = [NormalDist(0, 0.8).inv_cdf((i + 0.5) / 1024) for i in range(1024)]
LETTERS = [97 + i % 26 for i in range(4096)]
MEDIAN = 0.25
"""Of a sample's length, by the most that it may have; log-normal, sigma 0.8, cut at the most."""


def length_of(seed: int, most: int) -> int:
    """In tokens, the last of them ending the sample unless it has the most."""
    return max(1, min(most, math.ceil(MEDIAN * most * math.exp(QUANTILES[seed % 1024]))))


@dataclass(slots=True)
class Drawn:
    """What all workers together have done."""

    jobs: int = 0
    tokens: float = 0.0
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    loads: int = 0
    """Of adapters, from the shared folder."""
    lost: int = 0
    """Workers that were killed."""
    row_s: dict[int, float] = field(default_factory=dict)
    """By hour, seconds of rows."""


class Decoder:
    """Rows that are drawn side by side, a token each in a step whose time grows with the rows.

    Half of a job's rows end at their median length, the others at their longest.
    """

    def __init__(self, costs: Costs, drawn: Drawn, tell: Callable[[Frame, list[int]], None]):
        self._costs = costs
        self._drawn = drawn
        self._tell = tell
        self._rows = 0
        self._at, self._done = 0.0, 0.0
        """When it was last looked at, and the tokens of a row that had run from the beginning."""
        self._ends: list[tuple[float, int, int, Frame, list[int] | None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0
        self.stopped: set[int] = set()

    def add(self, frame: Frame, lengths: list[int]) -> None:
        self._go_on()
        ordered = sorted(lengths)
        half = len(ordered) // 2
        if half:
            self._push(ordered[half // 2], half, frame, None)
        self._push(ordered[-1], len(ordered) - half, frame, lengths)
        self._rows += len(ordered)
        self._wake()

    def _push(self, length: int, rows: int, frame: Frame, lengths: list[int] | None) -> None:
        self._count += 1
        heapq.heappush(self._ends, (self._done + UNIT * length, self._count, rows, frame, lengths))

    def _go_on(self) -> None:
        now = anyio.current_time()
        passed, self._at = now - self._at, now
        if self._rows:
            self._done += passed / self._costs.rows_step_s(self._rows)
            add(self._drawn.row_s, now, passed * self._rows)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ends:
            left = max(0.0, self._ends[0][0] - self._done)
            loop: asyncio.AbstractEventLoop = current_token().native_token  # type: ignore[assignment]
            self._timer = loop.call_later(
                left * self._costs.rows_step_s(self._rows) + 1e-6, self._end
            )

    def _end(self) -> None:
        self._go_on()
        while self._ends and self._ends[0][0] <= self._done:
            _, _, rows, frame, lengths = heapq.heappop(self._ends)
            self._rows -= rows
            if lengths is not None and frame["job"] not in self.stopped:
                self._tell(frame, lengths)
        self._wake()

    def close(self) -> None:
        self._go_on()
        if self._timer is not None:
            self._timer.cancel()


class Worker:
    """A `Link`."""

    def __init__(self, costs: Costs, drawn: Drawn, shared: Shared, group: Any) -> None:
        self._costs = costs
        self._drawn = drawn
        self._shared = shared
        self._group = group
        self._decoder = Decoder(costs, drawn, self._drew)
        self._reader = Streams(1)
        self._said: deque[Frame] = deque()
        self._some = anyio.Event()
        self._dead: str | None = None
        self._adapters: OrderedDict[int, anyio.Event] = OrderedDict()
        self._read: OrderedDict[tuple[str, tuple[int, ...]], int] = OrderedDict()

    def die(self, why: str) -> None:
        self._dead = why
        self._some.set()

    async def send(self, frame: Mapping[str, Any]) -> None:
        if self._dead:
            raise WorkerLostError(self._dead)
        do = frame["do"]
        if do == "start":
            rows, modules = self._costs.worker_rows, ["q_proj", "lm_head"]
            self._say(
                say="ready", rows=rows, tokens=340_000, modules=modules, both=True, versions={}
            )
        elif do == "sample":
            self._group.start_soon(self._sample, dict(frame))
        elif do == "load":
            self._group.start_soon(self._load, frame["adapter"], frame["ask"])
        elif do == "ping":
            self._say(say="answer", ask=frame["ask"])
        elif do == "forget":
            self._adapters.pop(frame["number"], None)
        elif do == "stop" and "index" not in frame:
            self._decoder.stopped.add(frame["job"])

    async def receive(self) -> Frame:
        while not self._said:
            if self._dead:
                raise WorkerLostError(self._dead)
            self._some = anyio.Event()
            await self._some.wait()
        return self._said.popleft()

    def _say(self, **frame: Any) -> None:
        self._said.append(frame)
        self._some.set()

    async def _load(self, adapter: dict[str, Any], ask: int) -> None:
        await self._hold(adapter)
        self._say(say="answer", ask=ask)

    async def _hold(self, adapter: dict[str, Any] | None) -> None:
        """Reads it from the shared folder, unless it is there."""
        if adapter is None:
            return
        held = self._adapters.get(adapter["number"])
        if held is not None:
            self._adapters.move_to_end(adapter["number"])
            await held.wait()
            return
        held = self._adapters[adapter["number"]] = anyio.Event()
        while len(self._adapters) > self._costs.held_adapters:
            self._adapters.popitem(last=False)
        self._drawn.loads += 1
        rank = json.loads((Path(adapter["folder"]) / CONFIG).read_text())["r"]
        await self._shared.move(self._costs.adapter_bytes(rank), "read")
        await anyio.sleep(self._costs.add_lora_s)
        held.set()

    async def _sample(self, frame: Frame) -> None:
        await self._hold(frame["adapter"])
        prompt = tuple(frame["prompt"])
        key = frame["adapter"]["name"] if frame["adapter"] else "", prompt
        frame["cached"] = len(prompt) if key in self._read else 0
        self._read[key] = len(prompt)
        self._read.move_to_end(key)
        if len(self._read) > self._costs.prefixes:
            self._read.popitem(last=False)
        self._drawn.prompt_tokens += UNIT * len(prompt)
        self._drawn.cached_tokens += UNIT * frame["cached"]
        await self._reader.take(UNIT * (len(prompt) - frame["cached"]) / self._costs.read_per_s)
        most = frame["params"]["max_tokens"]
        self._decoder.add(frame, [length_of(seed, most) for seed in frame["seeds"]])

    def _drew(self, frame: Frame, lengths: list[int]) -> None:
        most, rows = frame["params"]["max_tokens"], []
        for index, length in enumerate(lengths):
            tokens = LETTERS[frame["seeds"][index] % 26 :][:length]
            if length < most:
                tokens[-1] = EOS
            ended = "length" if length == most else "stop"
            logprobs = [-1.0] * length
            rows.append(
                [frame["job"], index, tokens, logprobs, logprobs, ended, None, frame["cached"]]
            )
        self._drawn.jobs += 1
        self._drawn.tokens += UNIT * sum(lengths)
        self._say(say="rows", rows=rows)

    def close(self) -> None:
        self._decoder.close()


class Site:
    """Where one worker is: it starts when it has joined, and again whenever it was killed."""

    def __init__(self, joins_at: float, costs: Costs, drawn: Drawn, shared: Shared) -> None:
        self.worker: Worker | None = None
        self._joins_at = joins_at
        self._parts = costs, drawn, shared

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Worker]:
        costs = self._parts[0]
        begins = max(0.0, self._joins_at - anyio.current_time())
        await anyio.sleep(begins + (costs.worker_start_s if anyio.current_time() else 0.0))
        async with anyio.create_task_group() as group:
            self.worker = Worker(*self._parts, group)
            try:
                yield self.worker
            finally:
                self.worker.close()
                self.worker = None
                group.cancel_scope.cancel()

    def kill(self) -> None:
        if self.worker is not None:
            self._parts[1].lost += 1
            self.worker.die("killed")


class Pool(SamplerPool):
    """The real one, on the event loop of its caller in place of a thread's."""

    def __init__(self, workers: Mapping[str, Opener], group: Any, **how: Any) -> None:
        super().__init__(SAMPLED, workers, start={}, **how)
        self._here = _Here(group)
        self.waits: list[tuple[str, float]] = []
        """Of each job for its worker: the tenant, seconds."""
        self.first_choices = [0, 0]
        """Jobs that went to the worker of their key's last job, and those that had a last one."""
        self._last: dict[bytes, str] = {}

    def _open(self) -> Any:
        if not self._here.kept:
            self._here.kept = True
            self._loop = current_token().native_token
            self._here.start_task_soon(self._keep)
        return self._here

    async def _placed(self, run: SampleRun, *, first: bool) -> Place | None:
        begin = anyio.current_time()
        place = await super()._placed(run, first=first)
        self.waits.append((run.job.tenant, anyio.current_time() - begin))
        if place is not None:
            last = self._last.get(run.key)
            if last is not None:
                self.first_choices[0] += last == place.name
                self.first_choices[1] += 1
            self._last[run.key] = place.name
        return place

    def close(self) -> None:
        """What its group runs ends with that."""
        self._shelf.close()


class _Here:
    """A portal to where one is already."""

    def __init__(self, group: Any) -> None:
        self.kept = False
        self._group = group

    def start_task_soon(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._group.start_soon(partial(self._do, work, args, future))
        return future

    async def _do(
        self, work: Callable[..., Awaitable[Any]], args: Any, future: Future[Any]
    ) -> None:
        try:
            future.set_result(await work(*args))
        except Exception as error:
            future.set_exception(error)
