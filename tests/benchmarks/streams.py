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
from typing import TYPE_CHECKING

import anyio

from tests.benchmarks.figures import Figure
from tests.contracts.caller import Caller
from weaver.client.http import HttpService
from weaver.protocol import Sample
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOOD, ROUNDS, TURNS = 1000, 20, 3
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


async def flood(address: str, key: str, stream: bool, size: int) -> None:
    """Sends many samples, reads every piece of them if they are streams, and says so."""
    async with HttpService(address, api_key=key) as service:
        caller = await Caller.open(service)
        ids = await caller.send(*(caller.stamp(sample(64, stream=stream)) for _ in range(size)))

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


async def waits(other: Caller, rounds: int) -> float:
    """Milliseconds of a sample of the other's at the median."""
    spent: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        await other.result(await other.start(sample(8)))
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent)


async def beside(other: Caller, command: list[str], rounds: int) -> float:
    """The same beside the flood, whose client is a process of its own."""
    pipe = subprocess.PIPE
    process = await anyio.open_process(command, stdin=pipe, stdout=pipe, stderr=None)
    async with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert (await process.stdout.receive()).startswith(b"sent")
        await anyio.sleep(0.5)
        median = await waits(other, rounds)
        await process.stdin.send(b"\n")
        await process.wait()
    return median


async def measure(
    address: str, keys: list[str], size: int, rounds: int, turns: int
) -> list[Figure]:
    command = [sys.executable, __file__, address, keys[0], str(size)]
    async with HttpService(address, api_key=keys[1]) as service:
        other = await Caller.open(service)
        alone = await waits(other, rounds)
        timed = [
            [await beside(other, [*command, *more], rounds) for more in ([], ["stream"])]
            for _ in range(turns)
        ]
    ratios = tuple(streamed / plain for plain, streamed in timed)
    return [
        Figure("a sample of 8 tokens alone", (alone,), "ms"),
        Figure(f"beside {size} samples", tuple(plain for plain, _ in timed), "ms"),
        Figure(f"beside {size} streams", tuple(streamed for _, streamed in timed), "ms"),
        Figure("streams by plain samples", ratios, "times"),
    ]


def figures(smoke: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as home:
        database = open_database(Path(home))
        keys = [Keys(database).create(project)[1] for project in ("flood", "other")]
        database.dispose()
        command = [sys.executable, "-c", SERVER, home]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                address = process.stdout.readline().strip()
                sizes = (8, 1, 1) if smoke else (FLOOD, ROUNDS, TURNS)
                yield from anyio.run(measure, address, keys, *sizes)
            finally:
                process.terminate()


if __name__ == "__main__":
    _, _address, _key, _size, *_stream = sys.argv
    anyio.run(flood, _address, _key, bool(_stream), int(_size))
