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

from tests.contracts.caller import HELLO, STEP
from tests.contracts.caller import Caller as Client
from weaver.engine.torch.engine import TorchEngine
from weaver.protocol import ForwardBackward, Sample
from weaver.server.keys import Caller
from weaver.server.service import LocalService
from weaver.types import SamplingParams

if TYPE_CHECKING:
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


async def waits(client: Client, run: str) -> tuple[float, float]:
    """Seconds, at the median, of a step and of a sample."""
    steps, samples = [], []
    for _ in range(ROUNDS):
        steps.append(await spent(client, [BATCH, STEP], run))
        samples.append(await spent(client, [sample(8)], None))
    return statistics.median(steps), statistics.median(samples)


async def spent(client: Client, operations: list[Operation], run: str | None) -> float:
    start = time.perf_counter()
    for submission_id in await client.send(*(client.stamp(one, run) for one in operations)):
        await client.result(submission_id)
    return time.perf_counter() - start


async def measure() -> None:
    engine = TorchEngine(threads=1)
    with tempfile.TemporaryDirectory() as home:
        async with LocalService(engine, home=Path(home)) as service:
            one, other = [
                Client(service, (await service.seen_by(Caller(project)).open_session()).session_id)
                for project in ("flood", "other")
            ]
            run = await other.create("weaver-nano")
            await waits(other, run)  # to warm up
            step_s, sample_s = await waits(other, run)
            start = time.perf_counter()
            ids = await one.send(*(one.stamp(sample(64, num_samples=4)) for _ in range(FLOOD)))
            beside_step_s, beside_sample_s = await waits(other, run)
            finished = await service.collect(one.session_id, after=0, timeout_s=0)
            for submission_id in ids:
                await one.result(submission_id)
            flood_s = time.perf_counter() - start
    engine.close()
    for name, alone_s, beside_s in (
        ("a step", step_s, beside_step_s),
        ("a sample", sample_s, beside_sample_s),
    ):
        print(
            f"{name}: {1000 * alone_s:.1f} ms alone, {1000 * beside_s:.1f} ms beside another "
            f"project's flood, {beside_s / alone_s:.1f} times as long"
        )
    print(f"the flood: {flood_s:.1f} s in all; {FLOOD - len(finished)} prompts were left meanwhile")


def main() -> None:
    anyio.run(measure)


if __name__ == "__main__":
    main()
