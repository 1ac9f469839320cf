"""What the service costs embedded, on the fake engine: one operation, and a thousand samples."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import anyio

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from weaver.protocol import Sample
from weaver.server.service import LocalService
from weaver.types import ModelInput, SamplingParams

PAIRS, SAMPLES, TOKENS = 200, 1000, 32


async def measure() -> tuple[float, float, float]:
    """Seconds: an operation at the median, the same in the engine alone, all samples."""
    in_engine = [0.0]
    with tempfile.TemporaryDirectory() as home:
        async with LocalService(_timed(in_engine), home=Path(home)) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            spent = []
            in_engine[0] = 0.0
            for operation in (GRADIENT, STEP) * PAIRS:
                start = time.perf_counter()
                await caller.result(await caller.start(operation, run))
                spent.append(time.perf_counter() - start)
            per_call = in_engine[0] / len(spent)
            sample = Sample(
                sampler_id="base:fake",
                prompt=ModelInput.from_ints([104, 105]),
                params=SamplingParams(max_tokens=TOKENS),
            )
            start = time.perf_counter()
            for submission_id in await caller.send(*(caller.stamp(sample) for _ in range(SAMPLES))):
                await caller.result(submission_id)
            return statistics.median(spent), per_call, time.perf_counter() - start


def _timed(total_s: list[float]) -> FakeEngine:
    """An engine that adds up the time of its training calls."""
    engine = FakeEngine()
    for name in ("forward_backward", "optim_step"):
        original = getattr(engine.trainer, name)

        def timed(*args: object, _original=original) -> object:  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            try:
                return _original(*args)
            finally:
                total_s[0] += time.perf_counter() - start

        setattr(engine.trainer, name, timed)
    return engine


def main() -> None:
    for backend in ("asyncio", "trio"):
        operation_s, engine_s, samples_s = anyio.run(measure, backend=backend)
        overhead_ms = (operation_s - engine_s) * 1e3
        print(
            f"{backend}: {overhead_ms:.2f} ms overhead per operation (bound 2 ms; "
            f"{engine_s * 1e3:.2f} ms more in the engine); {SAMPLES} samples of {TOKENS} tokens "
            f"at once in {samples_s:.2f} s, none failed"
        )


if __name__ == "__main__":
    main()
