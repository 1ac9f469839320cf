"""`Groups`: a trainer of several groups of ranks that take modelled time and keep exact accounts.

It stands where `ClusterEngine` does, below the real `PooledEngine`. A run's state is a number that
follows from all that was applied to it, in its order: what is lost or done twice changes it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import anyio
import numpy as np

from tests.simulate.clock import owe
from tests.simulate.costs import UNIT, Costs, Shared, add
from weaver.engine.base import GradientJob
from weaver.engine.cluster.lanes import GroupLanes
from weaver.engine.cluster.weights import CONFIG, STATE, TENSORS
from weaver.errors import EngineLostError, NoGradientsError, UnknownModelError
from weaver.tensors import TensorData
from weaver.types import ForwardBackwardResult, ModelInfo, OptimStepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from weaver.errors import WeaverError
    from weaver.types import AdamParams, LoraConfig

MODEL = ModelInfo(
    name="modelled-8b",
    architecture="Modelled",
    vocab_size=2**20,
    context_length=32_768 // UNIT,
    num_parameters=8_190_735_360,
    training_modes=("lora",),
)


@dataclass(slots=True)
class State:
    """What a run has come to."""

    rank: int
    step: int = 0
    digest: int = 0
    """Of all batches that were applied."""
    batch: list[int] = field(default_factory=list)


def digest(before: int, batch: Sequence[int]) -> int:
    """The next one, after a step on gradients of these numbers."""
    return crc32(repr((before, sorted(batch))).encode())


@dataclass(slots=True, eq=False)
class Group:
    """Ranks that compute together, one call at a time."""

    killed: anyio.Event
    runs: dict[str, State] = field(default_factory=dict)
    up: bool = False
    starts: int = 0
    busy_s: float = 0.0
    by_hour: dict[int, float] = field(default_factory=dict)
    starting: anyio.Lock = field(default_factory=anyio.Lock)


class Groups:
    """See `Engine`; it knows one model."""

    description = "modelled groups of ranks"
    counts: Mapping[str, int] = {}
    gauges: Mapping[str, float] = {}
    loaded_models = (MODEL.name,)

    def __init__(self, count: int, costs: Costs, shared: Shared, *, hashed: bool = False) -> None:
        self.costs = costs
        self.shared = shared
        self.groups = {f"group-{i}": Group(anyio.Event()) for i in range(count)}
        self.passes, self.jobs = 0, 0
        self.lost_calls, self.replayed = 0, 0
        self.took_s: Counter[str] = Counter()
        """Seconds of passes, by run; of one that several share, equal parts."""
        self._names = list(self.groups)
        self._lanes = GroupLanes()
        self._hashed = hashed
        self._most: dict[str, int] = {}
        """By run, the highest number of a gradient."""

    # --- what they are asked --------------------------------------------------------------------

    def lane(self, run_id: str, base_model: str) -> str:
        """As `ClusterEngine` has it, or once had."""
        if self._hashed:
            return self._names[crc32(run_id.encode()) % len(self._names)]
        return self._lanes.of(run_id, self._names) if run_id and base_model else ""

    async def create_run(
        self, run_id: str, base_model: str, *, lora_config: LoraConfig | None, **how: Any
    ) -> None:
        group = self.groups[self.lane(run_id, base_model)]
        async with group.starting:
            if not group.up:
                if group.starts:
                    await anyio.sleep(self.costs.group_start_s)
                group.up, group.killed = True, anyio.Event()
                group.starts += 1
        assert lora_config is not None
        self._lanes.of(run_id, self._names)
        self._lanes.add(run_id)
        group.runs[run_id] = State(lora_config.rank)

    async def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[ForwardBackwardResult | WeaverError]:
        group = self._group(jobs[0].run_id)
        tokens = UNIT * sum(datum.model_input.length for job in jobs for datum in job.datums)
        gradients = sum(self.costs.adapter_bytes(group.runs[job.run_id].rank) for job in jobs)
        seconds = self.costs.pass_s(tokens, gradients)
        await self._work(group, seconds)
        self.passes, self.jobs = self.passes + 1, self.jobs + len(jobs)
        for job in jobs:
            self.took_s[job.run_id] += seconds / len(jobs)
        return [self._gradient(group.runs[job.run_id], job) for job in jobs]

    def _gradient(self, state: State, job: GradientJob) -> ForwardBackwardResult:
        number = job.datums[0].model_input.chunks[0].tokens[0]
        self.replayed += number <= self._most.get(job.run_id, -1)
        self._most[job.run_id] = max(number, self._most.get(job.run_id, -1))
        state.batch.append(number)
        lengths = [datum.model_input.length for datum in job.datums]
        outputs = tuple({"logprobs": _logprobs(length)} for length in lengths)
        metrics = {"loss": 1.0, "num_tokens": float(sum(lengths))}
        return ForwardBackwardResult(loss_fn_outputs=outputs, metrics=metrics)

    async def optim_step(
        self, steps: Sequence[tuple[str, AdamParams]]
    ) -> Sequence[OptimStepResult | WeaverError]:
        group = self._group(steps[0][0])
        await self._work(group, self.costs.call_s)
        return [self._step(group.runs[run_id]) for run_id, _ in steps]

    def _step(self, state: State) -> OptimStepResult | WeaverError:
        if not state.batch:
            return NoGradientsError("no gradient was accumulated.")
        state.digest, state.step = digest(state.digest, state.batch), state.step + 1
        state.batch = []
        return OptimStepResult(metrics={"step": state.step, "digest": float(state.digest)})

    async def clear_gradients(self, run_id: str) -> None:
        self._group(run_id).runs[run_id].batch.clear()

    async def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        group = self._group(run_id)
        state = group.runs[run_id]
        size = self.costs.adapter_bytes(state.rank) * (3 if include_optimizer else 1)
        await self._work(group, size / self.costs.copy_bytes_per_s)
        told = {"step": state.step, "digest": state.digest, "base_model": MODEL.name}
        rank, text = state.rank, json.dumps(told)

        def write(folder: Path) -> None:
            (folder / CONFIG).write_text(json.dumps({"r": rank}))
            (folder / TENSORS).write_bytes(_header(rank))
            (folder / STATE).write_text(text)
            owe(partial(self.shared.move, size, "written"))

        return write

    async def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> int:
        group = self._group(run_id)
        state, told = group.runs[run_id], json.loads((folder / STATE).read_text())
        size = self.costs.adapter_bytes(state.rank) * (3 if include_optimizer else 1)
        await self.shared.move(size, "read")
        state.step, state.digest, state.batch = told["step"], told["digest"], []
        return state.step

    async def delete_run(self, run_id: str) -> None:
        self._lanes.discard(run_id)
        for group in self.groups.values():
            group.runs.pop(run_id, None)

    # --- time and loss --------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Its ranks end, with all that they have."""
        group = self.groups[name]
        group.up = False
        group.runs.clear()
        group.killed.set()

    def _group(self, run_id: str) -> Group:
        group = self.groups[self.lane(run_id, MODEL.name)]
        if run_id not in group.runs:
            raise EngineLostError("its ranks have ended")
        return group

    async def _work(self, group: Group, seconds: float) -> None:
        begin = anyio.current_time()
        killed = group.killed
        with anyio.move_on_after(seconds):
            await killed.wait()
        took = anyio.current_time() - begin
        group.busy_s += took
        add(group.by_hour, begin, took)
        if killed.is_set():
            self.lost_calls += 1
            raise EngineLostError("a rank has ended")

    # --- models ---------------------------------------------------------------------------------

    def list_models(self) -> Sequence[ModelInfo]:
        return [MODEL]

    def get_model(self, base_model: str) -> ModelInfo:
        if base_model != MODEL.name:
            raise UnknownModelError(f"no model is called {base_model!r}.", field="base_model")
        return MODEL

    def max_tokens_trained(self, base_model: str, training_mode: str) -> None:
        """Not known."""

    def close(self) -> None:
        """Has nothing."""


@cache
def _logprobs(length: int) -> TensorData:
    return TensorData(np.full(length, -1.0, dtype=np.float32))


@cache
def _header(rank: int) -> bytes:
    """Of a file of safetensors with one layer, without its values."""
    shapes = {"A": [rank, 1], "B": [1, rank]}
    header = {
        f"base_model.model.layer.q_proj.lora_{side}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [0, 0],
        }
        for side, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text
