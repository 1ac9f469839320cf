"""What an operation costs by Tinker's protocol, against the native one; on the fake engine.

One server, two clients, in turn. Both send a request and wait for its outcome with a second one, as
the published clients do. Bound (issue 12): 1.3 times the native one. Where other work runs beside
it, the server's CPU time says more than the time that passed.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import httpx

from tests.benchmarks.figures import Figure
from tests.benchmarks.serve import connect, cpu_seconds, server
from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.server.adapters.tinker import Tinker
from weaver.server.adapters.tinker import messages
from weaver.types import Datum

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

TURNS, PAIRS = 20, 10
"""A turn is so many passes, each with its step."""
LENGTHS = (3, 512)
"""Tokens of a datum; there are eight."""
DATUMS = 8


@dataclass(slots=True)
class Spent:
    """By one protocol."""

    passes_ms: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    """CPU time of an operation, of each turn."""


async def measure(address: str, pid: int, turns: int, length: int) -> tuple[Spent, Spent]:
    """Natively, and by Tinker's protocol."""
    tokens, targets = ([(at + t) % 250 for t in range(length)] for at in (1, 2))
    datum = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": targets})
    gradient = GRADIENT.model_copy(update={"datums": (datum,) * DATUMS})
    headers = {"X-API-Key": f"tml-{os.environ['WEAVER_API_KEY']}"}
    native, theirs = Spent(), Spent()
    async with (
        connect(address) as service,
        httpx.AsyncClient(base_url=address, headers=headers, verify=False) as http,
    ):
        caller, api = await Caller.open(service), Tinker(http)
        run, model = await caller.create(), await api.model()

        async def natively(_: int) -> None:
            await caller.result(await caller.start(gradient, run))

        async def natively_step(_: int) -> None:
            await caller.result(await caller.start(STEP, run))

        async def backward(n: int) -> None:
            inputs = {"target_tokens": targets}
            future = await api.backward(
                model, 2 * n + 1, datums=DATUMS, tokens=tokens, inputs=inputs
            )
            messages.ForwardBackwardOutput.FromString(await api.binary(future))

        async def step(n: int) -> None:
            await api.result(await api.step(model, 2 * n + 2))

        for turn in range(turns):
            await _turn(turn, pid, native, natively, natively_step)
            await _turn(turn, pid, theirs, backward, step)
    return native, theirs


async def _turn(
    turn: int,
    pid: int,
    spent: Spent,
    backward: Callable[[int], Awaitable[None]],
    step: Callable[[int], Awaitable[None]],
) -> None:
    before = cpu_seconds(pid)
    for n in range(turn * PAIRS, (turn + 1) * PAIRS):
        for call, kept in ((backward, spent.passes_ms), (step, spent.steps_ms)):
            start = time.perf_counter()
            await call(n)
            kept.append(1e3 * (time.perf_counter() - start))
    spent.server_ms.append(1e3 * (cpu_seconds(pid) - before) / (2 * PAIRS))


def figures(smoke: bool) -> Iterator[Figure]:
    turns = 1 if smoke else TURNS
    with server() as (address, pid):
        for length in LENGTHS:
            native, theirs = anyio.run(measure, address, pid, turns, length)
            size = f"{DATUMS} x {length} tokens"
            for what, ours, others in (
                (f"a pass of {size}", native.passes_ms, theirs.passes_ms),
                (f"a step after {size}", native.steps_ms, theirs.steps_ms),
            ):
                yield Figure(f"{what}: natively", tuple(ours), "ms")
                yield Figure(f"{what}: Tinker's", tuple(others), "ms")
                ratio = statistics.median(others) / statistics.median(ours)
                yield Figure(f"{what}: Tinker's by native", (ratio,), "times", at_most=1.3)
            yield Figure(f"{size}: CPU, natively", tuple(native.server_ms), "ms")
            yield Figure(f"{size}: CPU, Tinker's", tuple(theirs.server_ms), "ms")
            ratio = sum(theirs.server_ms) / max(sum(native.server_ms), 1e-9)
            yield Figure(f"{size}: CPU, Tinker's by native", (ratio,), "times", at_most=1.3)
