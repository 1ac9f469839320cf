"""What an operation costs by Tinker's protocol, against the native one; on the fake engine.

One server, two clients, operation by operation in turn. Both send a request and wait for its
outcome with a second one, as the published clients do. Bound (issue 12): 1.3 times the native one.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from tests.benchmarks.figures import Figure
from tests.benchmarks.serve import connect, server
from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.server.adapters.tinker import Tinker
from weaver.protocol import ForwardBackward
from weaver.server.adapters.tinker import messages
from weaver.types import Datum

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS = 200
LENGTHS = (3, 512)
"""Tokens of a datum; there are eight."""
DATUMS = 8


async def measure(address: str, pairs: int, length: int) -> dict[str, tuple[list[float], ...]]:
    """Of passes and of steps the seconds of each, natively and by Tinker's protocol."""
    tokens, targets = list(range(1, length + 1)), list(range(2, length + 2))
    tokens, targets = [t % 250 for t in tokens], [t % 250 for t in targets]
    datum = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": targets})
    gradient = GRADIENT.model_copy(update={"datums": (datum,) * DATUMS})
    assert isinstance(gradient, ForwardBackward)
    headers = {"X-API-Key": f"tml-{os.environ['WEAVER_API_KEY']}"}
    spent: dict[str, tuple[list[float], ...]] = {"pass": ([], []), "step": ([], [])}
    async with (
        connect(address) as service,
        httpx.AsyncClient(base_url=address, headers=headers, verify=False) as http,
    ):
        caller, api = await Caller.open(service), Tinker(http)
        run, model = await caller.create(), await api.model()
        given: dict[str, Any] = {"tokens": tokens, "inputs": {"target_tokens": targets}}
        for n in range(pairs):
            start = time.perf_counter()
            await caller.result(await caller.start(gradient, run))
            spent["pass"][0].append(time.perf_counter() - start)
            start = time.perf_counter()
            future = await api.backward(model, 2 * n + 1, datums=DATUMS, **given)
            messages.ForwardBackwardOutput.FromString(await api.binary(future))
            spent["pass"][1].append(time.perf_counter() - start)
            start = time.perf_counter()
            await caller.result(await caller.start(STEP, run))
            spent["step"][0].append(time.perf_counter() - start)
            start = time.perf_counter()
            await api.result(await api.step(model, 2 * n + 2))
            spent["step"][1].append(time.perf_counter() - start)
    return spent


def figures(smoke: bool) -> Iterator[Figure]:
    pairs = 3 if smoke else PAIRS
    with server() as (address, _):
        for length in LENGTHS:
            for kind, (native, theirs) in anyio.run(measure, address, pairs, length).items():
                after = "of" if kind == "pass" else "after"
                what = f"a {kind} {after} {DATUMS} x {length} tokens"
                yield Figure(f"{what}: natively", tuple(1e3 * one for one in native), "ms")
                yield Figure(f"{what}: Tinker's", tuple(1e3 * one for one in theirs), "ms")
                ratio = statistics.median(theirs) / statistics.median(native)
                yield Figure(f"{what}: Tinker's by native", (ratio,), "times", at_most=1.3)
