"""What the clients and the service cost, on the fake engine, whose own work is subtracted.

Bounds (issue 2): an operation under 2 ms, `import weaver` under 0.3 s, `close()` under 0.2 s and no
thread left, 1,000 samples at once without a failure.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import anyio

from tests.benchmarks.figures import Figure
from tests.fake_engine import FakeEngine
from weaver import AsyncServiceClient, Datum, ServiceClient
from weaver.checks import check_loss
from weaver.client import opening
from weaver.engine.base import GradientJob
from weaver.server.service import LocalService
from weaver.types import AdamParams, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEPS, SAMPLES = 300, 1000
DATUMS = [Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})]
ADAM = AdamParams(learning_rate=0.0)


def figures(smoke: bool) -> Iterator[Figure]:
    logging.getLogger("weaver").setLevel(logging.ERROR)
    steps, samples, starts = (3, 8, 1) if smoke else (STEPS, SAMPLES, 5)
    engine_ms = _engine_ms(steps)
    yield Figure("an operation in the fake engine alone", (engine_ms,), "ms")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name, total_ms in (
            ("async, one after another", anyio.run(_sequential, home, steps)),
            ("async, pipelined", anyio.run(_pipelined, home, steps)),
            ("sync, wait=True", _sync(home, steps)),
        ):
            overhead_ms = (total_ms - engine_ms,)
            yield Figure(f"overhead of an operation: {name}", overhead_ms, "ms", at_most=2)
        yield Figure(f"{samples} samples at once", (anyio.run(_samples, home, samples),), "ms")
        close_ms, threads = _close(home)
        yield Figure("close()", (close_ms,), "ms", at_most=200)
        yield Figure("threads left by it", (threads,), "", at_most=0)
    yield Figure("import weaver", _import_ms("import weaver", starts), "ms", at_most=300)
    clients = "from weaver import ServiceClient, types"
    yield Figure("import of ServiceClient and types", _import_ms(clients, starts), "ms")


def _engine_ms(steps: int) -> float:
    trainer = FakeEngine().trainer
    trainer.create_run("r", "fake", training_mode="lora", lora_config=LoraConfig(), seed=0)
    config = check_loss("cross_entropy", None)
    job = GradientJob(run_id="r", datums=DATUMS, loss_fn="cross_entropy", loss_fn_config=config)

    def pair() -> None:
        trainer.forward_backward([job])
        trainer.optim_step("r", ADAM)

    return _median_ms(pair, steps) / 2


def _median_ms(work: Callable[[], object], steps: int) -> float:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


async def _sequential(home: Path, steps: int) -> float:
    async with (
        LocalService(FakeEngine(), home=home) as service,
        AsyncServiceClient(service=service) as client,
    ):
        trainer = await client.create_model("fake")
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            await trainer.forward_backward(DATUMS)
            await trainer.optim_step(ADAM)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3 / 2


async def _pipelined(home: Path, steps: int) -> float:
    async with (
        LocalService(FakeEngine(), home=home) as service,
        AsyncServiceClient(service=service) as client,
    ):
        trainer = await client.create_model("fake")
        start = time.perf_counter()
        for _ in range(steps):
            trainer.forward_backward(DATUMS)
            last = trainer.optim_step(ADAM)
        await last
        return (time.perf_counter() - start) * 1e3 / (2 * steps)


def _sync(home: Path, steps: int) -> float:
    with _fake_client(home) as client:
        trainer = client.create_model("fake")

        def pair() -> None:
            trainer.forward_backward(DATUMS, wait=True)
            trainer.optim_step(ADAM, wait=True)

        return _median_ms(pair, steps) / 2


async def _samples(home: Path, count: int) -> float:
    async with (
        LocalService(FakeEngine(), home=home) as service,
        AsyncServiceClient(service=service) as client,
    ):
        sampler = await client.create_sampling_client(base_model="fake")
        start = time.perf_counter()
        handles = [sampler.sample([i % 256], {"max_tokens": 8}) for i in range(count)]
        for handle in handles:
            await handle
        return (time.perf_counter() - start) * 1e3


def _close(home: Path) -> tuple[float, int]:
    """Milliseconds, and the threads that are left 50 ms later."""
    before = threading.active_count()
    client = _fake_client(home)
    trainer = client.create_model("fake")
    for _ in range(100):
        trainer.forward_backward(DATUMS)
    start = time.perf_counter()
    client.close()
    seconds = time.perf_counter() - start
    time.sleep(0.05)
    return 1e3 * seconds, threading.active_count() - before


def _fake_client(home: Path) -> ServiceClient:
    with mock.patch.object(opening, "_torch_engine", lambda settings: FakeEngine()):
        return ServiceClient(home=home)


def _import_ms(statement: str, starts: int) -> tuple[float, ...]:
    script = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", script]
    return tuple(
        1e3 * float(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(starts)
    )
