"""What the tests of pools share: a pool of stand-ins, adapters without values, and jobs."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.fake_engine.model import EOS, ByteTokenizer
from weaver.engine.base import SampleJob, SampleProgress, WeightsRef
from weaver.engine.cluster.pool import SamplerPool
from weaver.engine.cluster.sampled_model import SampledModel
from weaver.engine.cluster.sampler_env import faults_of, wanted_here
from weaver.engine.cluster.weights import Shelf
from weaver.engine.cluster.worker_process import Opener, WorkerProcess
from weaver.types import SampleResult, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weaver.engine.base import Sampler
    from weaver.errors import WeaverError
    from weaver.types import SampleDelta

ENVIRONMENT = Path(__file__).parents[3] / ".venv-sampler"
STANDIN = Path(__file__).with_name("standin.py")
COMMAND = [sys.executable, str(STANDIN)]
BASE = WeightsRef(base_model="letters")
WAIT_S = 120
MODEL = SampledModel(
    name="letters",
    source="letters",
    context_length=64,
    head="lm_head",
    read_tokenizer=ByteTokenizer,
    read_ends=lambda: frozenset([EOS]),
)


def vllm_environment() -> Path:
    """That of `make test-cluster`; skips the test where it is not there, or not right."""
    environment = Path(os.environ.get("WEAVER_TEST_SAMPLER_ENV", ENVIRONMENT))
    if faults := faults_of(environment, wanted_here()):
        pytest.skip(f"{faults[0]}; `make test-cluster` makes it")
    return environment


@contextmanager
def standins(
    folder: Path,
    *,
    workers: int = 1,
    max_rank: int = 8,
    version: str = "1",
    opener: Callable[[str], Opener] | None = None,
    **how: Any,
) -> Iterator[SamplerPool]:
    """A pool of them; `how` as their start frame has it, `version` the one that is asked for.

    `opener` starts the one of a name, if not in a process of this one.
    """
    (folder / "pids").mkdir(parents=True, exist_ok=True)
    names = [f"worker-{i}" for i in range(workers)]

    def process(name: str) -> Opener:
        return WorkerProcess(command=COMMAND, log=folder / f"{name}.log").open

    pool = SamplerPool(
        MODEL,
        {name: (opener or process)(name) for name in names},
        start={"engine": {"pids": str(folder / "pids"), **how}},
        shelf=Shelf(folder / "shelf"),
        max_rank=max_rank,
        versions={"standin": version},
    )
    try:
        yield pool
    finally:
        pool.close()


def pids(folder: Path) -> list[int]:
    """Of the processes that run, the oldest first."""
    files = sorted((folder / "pids").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return [int(file.name) for file in files if runs(int(file.name))]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def until(condition: Callable[[], bool]) -> None:
    """Of what tells nobody."""
    with anyio.fail_after(WAIT_S):
        for _ in repeat(None):
            if condition():
                return
            await anyio.sleep(0.01)


async def gone(pid: int) -> None:
    await until(lambda: not runs(pid))


def save_adapter(folder: Path, *, rank: int = 4, layers: tuple[str, ...] = ("q_proj",)) -> Path:
    """The files of an adapter; its values are all zero."""
    folder.mkdir(parents=True)
    shapes = {
        f"base_model.model.layer.{layer}.lora_{side}.weight": [rank, 2]
        if side == "A"
        else [2, rank]
        for layer in layers
        for side in "AB"
    }
    size = rank * 2 * 4
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, (name, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(size * len(shapes))
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "weaver_state.json").write_text(json.dumps({"step": 3, "base_model": "letters"}))
    return folder


def a_job(
    prompt: str | list[int] = "hi",
    job_id: str = "job",
    *,
    weights_id: str = "base",
    n: int = 1,
    prompt_logprobs: bool = False,
    stream: bool = False,
    tenant: str = "",
    **params: Any,
) -> SampleJob:
    return SampleJob(
        job_id=job_id,
        weights_id=weights_id,
        prompt=list(prompt.encode()) if isinstance(prompt, str) else prompt,
        params=SamplingParams(**{"max_tokens": 12, "seed": 0, **params}),
        num_samples=n,
        include_prompt_logprobs=prompt_logprobs,
        stream=stream,
        tenant=tenant,
    )


@dataclass
class Told:
    """What was told of a job."""

    progress: list[SampleProgress] = field(default_factory=list)
    ended: anyio.Event = field(default_factory=anyio.Event)
    some: anyio.Event = field(default_factory=anyio.Event)
    drop: Callable[[], None] = lambda: None

    def hear(self, progress: SampleProgress) -> None:
        assert not self.ended.is_set(), "nothing comes after the last"
        self.progress.append(progress)
        self.some.set()
        if progress.result is not None or progress.error is not None:
            self.ended.set()

    @property
    def deltas(self) -> list[SampleDelta]:
        return [delta for progress in self.progress for delta in progress.deltas]

    async def result(self) -> SampleResult:
        with anyio.fail_after(WAIT_S):
            await self.ended.wait()
        last = self.progress[-1]
        assert last.result is not None, last.error
        return last.result

    async def error(self) -> WeaverError:
        with anyio.fail_after(WAIT_S):
            await self.ended.wait()
        last = self.progress[-1]
        assert last.error is not None, last.result
        return last.error


def begin(sampler: Sampler, job: SampleJob) -> Told:
    told = Told()
    told.drop = sampler.sample(job, told.hear)
    return told


async def one(sampler: Sampler, *args: Any, **params: Any) -> Any:
    """The only sample of a job."""
    [sequence] = (await begin(sampler, a_job(*args, **params)).result()).sequences
    return sequence
