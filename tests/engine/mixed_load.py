"""Trains and samples for a while in a process of its own, and prints what memory it has meanwhile.

`python -m tests.engine.mixed_load STEPS [keep]`: four tenants of different ranks take so many steps
of the bundled model, in merged passes, 64 samples of their weights are always in flight, and each
snapshot that is published is released when the next one is there; with `keep` it is not, which is
a leak. Prints a JSON list: resident bytes, ten times.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from functools import partial

import anyio
import torch

from weaver.checks import check_loss
from weaver.engine.base import GradientJob, SampleJob, SampleProgress
from weaver.engine.torch.engine import TorchEngine
from weaver.types import (
    AdamParams,
    Datum,
    ForwardBackwardResult,
    LoraConfig,
    OptimStepResult,
    SamplingParams,
)

MODEL = "weaver-nano"
RANKS = {"two": 2, "four": 4, "eight": 8, "sixteen": 16}
IN_FLIGHT = 64
READS = 10


class Load:
    def __init__(self, engine: TorchEngine, *, keep: bool) -> None:
        self.engine = engine
        self.keep = keep
        self.newest: dict[str, str] = {}
        """By tenant, the id of the weights that it samples from."""
        self.count = 0
        self.flying = 0
        self.stopping = False
        self.ended = anyio.Event()
        self.random = random.Random(0)

    async def sample(self) -> None:
        """Keeps so many in flight until told to stop, and then waits for them."""
        while self.flying or not self.stopping:
            self.ended = anyio.Event()
            self.fill()
            await self.ended.wait()

    def fill(self) -> None:
        while self.flying < IN_FLIGHT and not self.stopping:
            self.count += 1
            self.flying += 1
            tenant = self.random.choice(list(self.newest))
            shared = self.random.random() < 0.5
            prompt = [5] * 20 if shared else self.tokens(self.random.randrange(1, 60))
            longest = min(200, int(self.random.expovariate(1 / 20)) + 1)
            params = SamplingParams(max_tokens=longest, seed=self.count)
            job = SampleJob(
                job_id=f"job-{self.count}",
                weights_id=self.newest[tenant],
                prompt=prompt,
                params=params,
                num_samples=1,
                tenant=tenant,
            )
            self.engine.sample(job, self.told)

    def told(self, progress: SampleProgress) -> None:
        assert progress.error is None, progress.error
        if progress.result is not None:
            self.flying -= 1
            self.ended.set()

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3, 90) for _ in range(count)]

    def job(self, tenant: str) -> GradientJob:
        rows = [self.tokens(self.random.randrange(4, 80)) for _ in range(4)]
        datums = [
            Datum(model_input=row[:-1], loss_fn_inputs={"target_tokens": row[1:]}) for row in rows
        ]
        config = check_loss("cross_entropy", None)
        return GradientJob(
            run_id=tenant, datums=datums, loss_fn="cross_entropy", loss_fn_config=config
        )

    async def publish(self, tenant: str) -> None:
        ref = await self.engine.snapshot(tenant)
        weights_id = f"{tenant}-{ref.version}"
        await self.engine.publish(weights_id, ref)
        before = self.newest.get(tenant)
        self.newest[tenant] = weights_id
        if before is not None and not self.keep:
            await self.engine.release(before)

    async def round(self) -> None:
        """A step of each tenant, each with a snapshot."""
        results = await self.engine.forward_backward([self.job(tenant) for tenant in RANKS])
        assert all(isinstance(result, ForwardBackwardResult) for result in results), results
        params = AdamParams(learning_rate=1e-3)
        taken = await self.engine.optim_step([(tenant, params) for tenant in RANKS])
        assert all(isinstance(step, OptimStepResult) for step in taken), taken
        for tenant in RANKS:
            await self.publish(tenant)


async def run(steps: int, *, keep: bool) -> list[int]:
    torch.set_num_threads(1)
    engine = TorchEngine(threads=1)
    load, rounds, read = Load(engine, keep=keep), steps // len(RANKS), []
    for tenant, rank in RANKS.items():
        config = LoraConfig(rank=rank)
        await engine.create_run(tenant, MODEL, training_mode="lora", lora_config=config, seed=0)
        await load.publish(tenant)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load.sample)
        for number in range(1, rounds + 1):
            await load.round()
            if number * READS % rounds < READS:
                read.append(resident_bytes())
        load.stopping = True
        load.ended.set()
    engine.close()
    return read


def resident_bytes() -> int:
    """Of this process, without what the allocator only keeps."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    main = partial(run, int(sys.argv[1]), keep="keep" in sys.argv)
    sys.stdout.write(json.dumps(anyio.run(main)))
