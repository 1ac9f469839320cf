"""What the service costs embedded, on the fake engine: one operation, and a thousand samples."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from tests.benchmarks.figures import Figure
from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from weaver.protocol import Sample
from weaver.server.service import LocalService
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS, SAMPLES, TOKENS = 200, 1000, 32


async def measure(pairs: int = PAIRS, samples: int = SAMPLES) -> tuple[list[float], float, float]:
    """Seconds: of each operation, of one in the engine alone, of all samples."""
    in_engine = [0.0]
    with tempfile.TemporaryDirectory() as home:
        async with LocalService(_timed(in_engine), home=Path(home)) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            spent = []
            in_engine[0] = 0.0
            for operation in (GRADIENT, STEP) * pairs:
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
            for submission_id in await caller.send(*(caller.stamp(sample) for _ in range(samples))):
                await caller.result(submission_id)
            return spent, per_call, time.perf_counter() - start


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


def figures(smoke: bool) -> Iterator[Figure]:
    pairs, samples = (2, 8) if smoke else (PAIRS, SAMPLES)
    for backend in ("asyncio", "trio"):
        spent, engine_s, samples_s = anyio.run(measure, pairs, samples, backend=backend)
        overheads = tuple(1e3 * (one - engine_s) for one in spent)
        yield Figure(f"{backend}: overhead of an operation", overheads, "ms", at_most=2)
        name = f"{backend}: {samples} samples of {TOKENS} tokens at once"
        yield Figure(name, (samples_s,), "s")
