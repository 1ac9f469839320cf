"""What a server costs on loopback, with the fake engine in a process of its own.

Bounds (issue 4): HTTP and the journal add under 5 ms to an operation at the median; 1,000 samples
in flight from one client and 64 clients at once without an error; 16 x 4096 tokens take under 60 ms
of client time and 8 bytes a token; an idle server takes under 1 % of a core. Where other work runs
beside it, only CPU time and the ratio to requests that do nothing say anything.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import httpx

from tests.benchmarks.figures import Figure
from tests.benchmarks.service import measure
from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.test_wire import batch_of
from weaver import AsyncServiceClient, types, wire
from weaver.client.http import HttpService
from weaver.protocol import CreateModel, ModelCreated
from weaver.server.database import open_database
from weaver.server.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS, SAMPLES, CLIENTS, UPLOADS = 200, 1000, 64, 20
SERVER = """
import asyncio, pathlib, sys
from tests.fake_engine import FakeEngine
from weaver.server.serve import run_server
from weaver.server.settings import ServerSettings
settings = ServerSettings(home=pathlib.Path(sys.argv[1]), port=0)
started = lambda running: print(running.address, flush=True)
asyncio.run(run_server(FakeEngine(context_length=2**20), settings, started=started))
"""


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """The address and the process id of a server."""
    with tempfile.TemporaryDirectory() as home:
        database = open_database(Path(home))
        os.environ["WEAVER_API_KEY"] = Keys(database).create("benchmark")[1]
        database.dispose()
        command = [sys.executable, "-c", SERVER, home]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip(), process.pid
            finally:
                process.terminate()


def connect(address: str) -> HttpService:
    return HttpService(address, api_key=os.environ["WEAVER_API_KEY"])


async def operations(address: str, pid: int, pairs: int) -> tuple[list[float], float, float]:
    """Seconds from call to result, one after the other; CPU seconds of one, of each side."""
    async with connect(address) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        spent = []
        cpu = time.process_time(), cpu_seconds(pid)
        for operation in (GRADIENT, STEP) * pairs:
            start = time.perf_counter()
            await caller.result(await caller.start(operation, run))
            spent.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu[0], cpu_seconds(pid) - cpu[1]
        return spent, cpu[0] / len(spent), cpu[1] / len(spent)


async def bare(address: str, pairs: int) -> float:
    """Seconds for the two requests of an operation if they did nothing, at the median."""
    async with httpx.AsyncClient(base_url=address, verify=False) as client:
        spent = []
        for _ in range(2 * pairs):
            start = time.perf_counter()
            for _ in range(2):
                await client.get("/healthz")
            spent.append(time.perf_counter() - start)
        return statistics.median(spent)


async def samples(address: str, count: int) -> float:
    """Seconds for `count` samples in flight from one client."""
    async with AsyncServiceClient(address) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        start = time.perf_counter()
        handles = [
            sampler.sample(prompt="hi", sampling_params=types.SamplingParams(max_tokens=32))
            for _ in range(count)
        ]
        for handle in handles:
            assert (await handle).sequences[0].tokens
        return time.perf_counter() - start


async def many_clients(address: str, count: int) -> float:
    """Seconds until as many clients have each trained a step and sampled."""
    start = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(_one_client, address)
    return time.perf_counter() - start


async def _one_client(address: str) -> None:
    async with connect(address) as service:
        caller = await Caller.open(service)
        created = await caller.do(CreateModel(base_model="fake"), ModelCreated)
        for operation in (GRADIENT, STEP):
            await caller.result(await caller.start(operation, created.run.run_id))
    await samples(address, 4)


async def uploads(address: str, times: int) -> tuple[list[float], list[float], float]:
    """Seconds to encode, seconds until acknowledged, bytes a token; 16 x 4096 tokens."""
    batch = batch_of(16, 4096)
    encoding, sending = [], []
    async with connect(address) as service:
        caller = await Caller.open(service)
        for n in range(times):
            start = time.perf_counter()
            size = len(wire.encode(batch))
            encoding.append(time.perf_counter() - start)
            start = time.perf_counter()
            again = batch[0].model_copy(update={"id": str(n), "seq": n + 1})
            await service.submit(caller.session_id, [again])
            sending.append(time.perf_counter() - start)
    return encoding, sending, size / (16 * 4096)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def figures(smoke: bool) -> Iterator[Figure]:
    small, whole = (2, 8, 2, 1, 0.1), (PAIRS, SAMPLES, CLIENTS, UPLOADS, 5.0)
    pairs, count, clients, times, idle_s = small if smoke else whole
    with server() as (address, pid):
        floor_s = anyio.run(bare, address, pairs)
        embedded_s = statistics.median(anyio.run(measure, pairs, count)[0])
        spent, client_s, server_s = anyio.run(operations, address, pid, pairs)
        more_ms = tuple(1e3 * (one - embedded_s) for one in spent)
        yield Figure("an operation: more than embedded", more_ms, "ms", at_most=5)
        ratio = statistics.median(spent) / floor_s
        yield Figure("an operation by two requests that do nothing", (ratio,), "times")
        yield Figure("an operation: CPU of the client", (1e3 * client_s,), "ms")
        yield Figure("an operation: CPU of the server", (1e3 * server_s,), "ms")
        yield Figure(f"{count} samples in flight", (anyio.run(samples, address, count),), "s")
        all_s = anyio.run(many_clients, address, clients)
        yield Figure(f"{clients} clients at once", (all_s,), "s")
        encoded_s, sent_s, size = anyio.run(uploads, address, times)
        encoded_ms, sent_ms = [tuple(1e3 * one for one in each) for each in (encoded_s, sent_s)]
        yield Figure("16 x 4096 tokens: encoded", encoded_ms, "ms", at_most=60)
        yield Figure("16 x 4096 tokens: until acknowledged", sent_ms, "ms")
        yield Figure("16 x 4096 tokens: a token", (size,), "bytes", at_most=8)
        before = cpu_seconds(pid)
        time.sleep(idle_s)
        share = 100 * (cpu_seconds(pid) - before) / idle_s
        yield Figure("idle: of a core", (share,), "%", at_most=1)
