"""How long a sample waits beside another project's flood of streams, against one of plain samples.

The fake engine in a process of its own, whose steps take 5 ms for 64 rows; a thousand samples of 64
tokens, of which every piece is read over a connection of its own, or none.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio

from tests.contracts.caller import Caller
from weaver.client.http import HttpService
from weaver.protocol import Sample
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.types import ModelInput, SamplingParams

FLOOD, ROUNDS = 1000, 20
SERVER = """
import asyncio, pathlib, sys, time
from tests.fake_engine import FakeEngine
from weaver.server.serve import run_server
from weaver.server.settings import ServerSettings
settings = ServerSettings(home=pathlib.Path(sys.argv[1]), port=0)
engine = FakeEngine(slots=64, hook=lambda name, argument: time.sleep(0.005 * (name == "step")))
started = lambda running: print(running.address, flush=True)
asyncio.run(run_server(engine, settings, started=started))
"""


def sample(tokens: int, *, stream: bool = False) -> Sample:
    return Sample(
        sampler_id="base:fake",
        prompt=ModelInput.from_ints([1]),
        params=SamplingParams(max_tokens=tokens),
        stream=stream,
    )


async def waits(other: Caller, flood: Caller, *, stream: bool) -> float:
    """Seconds of the other's sample at the median, beside the flood."""
    spent: list[float] = []
    pieces = 0

    async def read(submission_id: str) -> None:
        nonlocal pieces
        async for _ in flood.service.stream(flood.session_id, submission_id):
            pieces += 1

    async with anyio.create_task_group() as tasks:
        ids = await flood.send(*(flood.stamp(sample(64, stream=stream)) for _ in range(FLOOD)))
        if stream:
            for submission_id in ids:
                tasks.start_soon(read, submission_id)
        await anyio.sleep(0.5)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            await other.result(await other.start(sample(8)))
            spent.append(time.perf_counter() - start)
        tasks.cancel_scope.cancel()
    await flood.service.cancel(flood.session_id, ids)
    assert bool(pieces) == stream
    return statistics.median(spent)


async def measure(address: str, keys: list[str]) -> None:
    services = [HttpService(address, api_key=key) for key in keys]
    async with services[0], services[1]:
        flood, other = [await Caller.open(service) for service in services]
        alone_s = statistics.median([await _spent(other) for _ in range(ROUNDS)])
        ratios = []
        for _ in range(3):
            plain_s = await waits(other, flood, stream=False)
            streamed_s = await waits(other, flood, stream=True)
            ratios.append(streamed_s / plain_s)
            print(
                f"a sample of 8 tokens: {1000 * alone_s:.0f} ms alone, {1000 * plain_s:.0f} ms "
                f"beside {FLOOD} samples, {1000 * streamed_s:.0f} ms beside {FLOOD} streams"
            )
    print(f"streams against plain samples: {statistics.median(ratios):.2f} times as long")


async def _spent(other: Caller) -> float:
    start = time.perf_counter()
    await other.result(await other.start(sample(8)))
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        database = open_database(Path(home))
        keys = [Keys(database).create(project)[1] for project in ("flood", "other")]
        database.dispose()
        command = [sys.executable, "-c", SERVER, home]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                anyio.run(measure, process.stdout.readline().strip(), keys)
            finally:
                process.terminate()


if __name__ == "__main__":
    main()
