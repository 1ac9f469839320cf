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


async def flood(address: str, key: str, stream: bool) -> None:
    """Sends a thousand samples, reads every piece of them if they are streams, and says so."""
    async with HttpService(address, api_key=key) as service:
        caller = await Caller.open(service)
        ids = await caller.send(*(caller.stamp(sample(64, stream=stream)) for _ in range(FLOOD)))

        async def read(submission_id: str) -> None:
            async for _ in service.stream(caller.session_id, submission_id):
                pass

        async with anyio.create_task_group() as tasks:
            if stream:
                for submission_id in ids:
                    tasks.start_soon(read, submission_id)
            print("sent", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)
            tasks.cancel_scope.cancel()
        await service.cancel(caller.session_id, ids)


async def waits(other: Caller) -> float:
    """Seconds of a sample of the other's at the median."""
    spent: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        await other.result(await other.start(sample(8)))
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


async def beside(other: Caller, address: str, key: str, *, stream: bool) -> float:
    """The same beside the flood, whose client is a process of its own."""
    command = [sys.executable, __file__, address, key, "stream" * stream]
    pipe = subprocess.PIPE
    process = await anyio.open_process(command, stdin=pipe, stdout=pipe, stderr=None)
    async with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert (await process.stdout.receive()).startswith(b"sent")
        await anyio.sleep(0.5)
        median = await waits(other)
        await process.stdin.send(b"\n")
        await process.wait()
    return median


async def measure(address: str, keys: list[str]) -> None:
    async with HttpService(address, api_key=keys[1]) as service:
        other = await Caller.open(service)
        alone_s = await waits(other)
        ratios = []
        for _ in range(3):
            plain_s, streamed_s = [
                await beside(other, address, keys[0], stream=stream) for stream in (False, True)
            ]
            ratios.append(streamed_s / plain_s)
            print(
                f"a sample of 8 tokens: {1000 * alone_s:.0f} ms alone, {1000 * plain_s:.0f} ms "
                f"beside {FLOOD} samples, {1000 * streamed_s:.0f} ms beside {FLOOD} streams"
            )
    print(f"streams against plain samples: {statistics.median(ratios):.2f} times as long")


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
    if sys.argv[1:]:
        anyio.run(flood, sys.argv[1], sys.argv[2], bool(sys.argv[3]))
    else:
        main()
