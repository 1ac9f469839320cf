"""How long a project waits beside another one's flood: a thousand prompts on `weaver-nano`.

One thread. A step is a gradient pass of 8 sequences and an optimizer step; a sample has at most 8
tokens, those of the flood have 64, and four to a prompt. Both are submitted one after the other, in
a lull and in the flood.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from tests.benchmarks.figures import Figure
from tests.contracts.caller import HELLO, STEP
from tests.contracts.caller import Caller as Client
from weaver.engine.torch.engine import TorchEngine
from weaver.protocol import ForwardBackward, Sample
from weaver.server.keys import Caller
from weaver.server.service import LocalService
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.protocol import Operation

FLOOD, ROUNDS = 1000, 20
BATCH = ForwardBackward(datums=(HELLO,) * 8, loss_fn="cross_entropy")


def sample(max_tokens: int, *, num_samples: int = 1) -> Sample:
    return Sample(
        sampler_id="base:weaver-nano",
        prompt="rev:abc=",
        params=SamplingParams(max_tokens=max_tokens),
        num_samples=num_samples,
    )


async def waits(client: Client, run: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each step and of each sample."""
    steps, samples = [], []
    for _ in range(rounds):
        steps.append(1e3 * await spent(client, [BATCH, STEP], run))
        samples.append(1e3 * await spent(client, [sample(8)], None))
    return steps, samples


async def spent(client: Client, operations: list[Operation], run: str | None) -> float:
    start = time.perf_counter()
    for submission_id in await client.send(*(client.stamp(one, run) for one in operations)):
        await client.result(submission_id)
    return time.perf_counter() - start


async def measure(flood: int, rounds: int) -> list[Figure]:
    engine = TorchEngine(threads=1)
    with tempfile.TemporaryDirectory() as home:
        async with LocalService(engine, home=Path(home)) as service:
            one, other = [
                Client(service, (await service.seen_by(Caller(project)).open_session()).session_id)
                for project in ("flood", "other")
            ]
            run = await other.create("weaver-nano")
            await waits(other, run, rounds)  # to warm up
            alone = await waits(other, run, rounds)
            start = time.perf_counter()
            ids = await one.send(*(one.stamp(sample(64, num_samples=4)) for _ in range(flood)))
            beside = await waits(other, run, rounds)
            finished = await service.collect(one.session_id, after=0, timeout_s=0)
            for submission_id in ids:
                await one.result(submission_id)
            flood_s = time.perf_counter() - start
    engine.close()
    said = []
    for name, alone_ms, beside_ms in zip(("a step", "a sample"), alone, beside, strict=True):
        times = statistics.median(beside_ms) / statistics.median(alone_ms)
        said += [
            Figure(f"{name} alone", tuple(alone_ms), "ms"),
            Figure(f"{name} beside another project's flood", tuple(beside_ms), "ms"),
            Figure(f"{name}: beside the flood by alone", (times,), "times"),
        ]
    left = Figure("prompts of the flood that were left meanwhile", (flood - len(finished),), "")
    return [*said, Figure("the flood in all", (flood_s,), "s"), left]


def figures(smoke: bool) -> Iterator[Figure]:
    yield from anyio.run(measure, *((8, 1) if smoke else (FLOOD, ROUNDS)))
