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

import anyio

from tests.fake_engine import FakeEngine
from weaver import AsyncServiceClient, Datum, ServiceClient
from weaver.checks import check_loss
from weaver.client import service as client_service
from weaver.engine.base import GradientJob
from weaver.server.service import LocalService
from weaver.types import AdamParams, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 300
DATUMS = [Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})]
ADAM = AdamParams(learning_rate=0.0)


def main() -> None:
    logging.getLogger("weaver").setLevel(logging.ERROR)
    engine_ms = _engine_ms()
    print(f"the fake engine alone       {engine_ms:8.3f} ms per operation")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        _report("async, one after another", anyio.run(_sequential, home), engine_ms)
        _report("async, pipelined", anyio.run(_pipelined, home), engine_ms)
        _report("sync, wait=True", _sync(home), engine_ms)
        print(f"1,000 samples at once       {anyio.run(_samples, home):8.1f} ms in all")
        close_s, threads = _close(home)
        print(f"close()                     {close_s * 1e3:8.1f} ms, bound 200; threads: {threads}")
    print(f"import weaver               {_seconds('import weaver') * 1e3:8.1f} ms, bound 300")
    clients = _seconds("from weaver import ServiceClient, types")
    print(f"import ServiceClient, types {clients * 1e3:8.1f} ms")


def _report(name: str, total_ms: float, engine_ms: float) -> None:
    print(f"{name:27} {total_ms - engine_ms:8.3f} ms overhead per operation, bound 2")


def _engine_ms() -> float:
    trainer = FakeEngine().trainer
    trainer.create_run("r", "fake", training_mode="lora", lora_config=LoraConfig(), seed=0)
    config = check_loss("cross_entropy", None)
    job = GradientJob(run_id="r", datums=DATUMS, loss_fn="cross_entropy", loss_fn_config=config)

    def pair() -> None:
        trainer.forward_backward([job])
        trainer.optim_step("r", ADAM)

    return _median_ms(pair) / 2


def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


async def _sequential(home: Path) -> float:
    async with (
        LocalService(FakeEngine(), home=home) as service,
        AsyncServiceClient(service=service) as client,
    ):
        trainer = await client.create_model("fake")
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            await trainer.forward_backward(DATUMS)
            await trainer.optim_step(ADAM)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3 / 2


async def _pipelined(home: Path) -> float:
    async with (
        LocalService(FakeEngine(), home=home) as service,
        AsyncServiceClient(service=service) as client,
    ):
        trainer = await client.create_model("fake")
        start = time.perf_counter()
        for _ in range(STEPS):
            trainer.forward_backward(DATUMS)
            last = trainer.optim_step(ADAM)
        await last
        return (time.perf_counter() - start) * 1e3 / (2 * STEPS)


def _sync(home: Path) -> float:
    with _fake_client(home) as client:
        trainer = client.create_model("fake")

        def pair() -> None:
            trainer.forward_backward(DATUMS, wait=True)
            trainer.optim_step(ADAM, wait=True)

        return _median_ms(pair) / 2


async def _samples(home: Path) -> float:
    async with (
        LocalService(FakeEngine(), home=home) as service,
        AsyncServiceClient(service=service) as client,
    ):
        sampler = await client.create_sampling_client(base_model="fake")
        start = time.perf_counter()
        handles = [sampler.sample([i % 256], {"max_tokens": 8}) for i in range(1000)]
        for handle in handles:
            await handle
        return (time.perf_counter() - start) * 1e3


def _close(home: Path) -> tuple[float, list[str]]:
    client = _fake_client(home)
    trainer = client.create_model("fake")
    for _ in range(100):
        trainer.forward_backward(DATUMS)
    start = time.perf_counter()
    client.close()
    seconds = time.perf_counter() - start
    time.sleep(0.05)
    return seconds, [t.name for t in threading.enumerate() if t is not threading.main_thread()]


def _fake_client(home: Path) -> ServiceClient:
    client_service._torch_engine = lambda settings: FakeEngine()
    return ServiceClient(home=home)


def _seconds(statement: str) -> float:
    script = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return min(
        float(
            subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        )
        for _ in range(5)
    )


if __name__ == "__main__":
    main()
