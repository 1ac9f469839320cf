"""What Ray costs a group of two ranks: a call, and a pause where a rank is killed.

A client trains weaver-nano with a service in this process. Bounds (issue 13): a call takes 5 ms at
most, and there is none for a token; what runs when a rank is killed goes on within 30 s.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from tests.benchmarks.figures import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.client.training import AsyncTrainingClient
    from weaver.engine.cluster.engine import ClusterEngine
    from weaver.engine.cluster.group import TrainerGroup

CALLS, KILLS = 200, 5
WITHIN_S = 120.0


@contextmanager
def cluster(folder: Path) -> Iterator[ClusterEngine]:
    from weaver.engine.cluster.config import ClusterConfig, GroupConfig
    from weaver.engine.cluster.engine import ClusterEngine
    from weaver.engine.torch.engine import TorchEngine

    group = GroupConfig(model="weaver-nano", ranks=2, device="cpu", threads=1, cpus=0.5)
    config = ClusterConfig(address="local", trainer=(group,))
    engine = ClusterEngine(TorchEngine(device="cpu", threads=1), config, home=folder)
    try:
        yield engine
    finally:
        engine.close()


async def measure(engine: ClusterEngine, folder: Path, smoke: bool) -> list[Figure]:
    from weaver import AsyncServiceClient
    from weaver.server.database import open_database
    from weaver.server.journal import Journal
    from weaver.server.service import LocalService

    [group] = engine._groups.values()
    database = open_database(folder / "home", None)
    async with (
        LocalService(engine, home=folder / "home", store=Journal(database)) as service,
        AsyncServiceClient(service=service, home=folder / "home") as client,
    ):
        trainer = await client.create_model("weaver-nano", {"rank": 8})
        await step(trainer, 1, 8)
        figures = [
            Figure("a call of two ranks through Ray", await calls(group, smoke), "ms", 5.0),
            *await passes(group, trainer),
            *await kills(group, trainer, smoke),
        ]
    database.dispose()
    return figures


async def step(trainer: AsyncTrainingClient, count: int, tokens: int) -> None:
    from tests.engine.conftest import datum, sequences

    data = [datum(one) for one in sequences(*[tokens] * count)]
    passing = trainer.forward_backward(data, "cross_entropy")
    stepping = trainer.optim_step({"learning_rate": 1e-4})
    await passing
    await stepping


async def calls(group: TrainerGroup, smoke: bool) -> tuple[float, ...]:
    """Milliseconds of calls that compute nothing."""
    assert group.ranks is not None
    [run] = group.ranks.runs
    spent = []
    for _ in range(20 if smoke else CALLS):
        begin = time.perf_counter()
        await group.call([run], "clear_gradients", run)
        spent.append(1000 * (time.perf_counter() - begin))
    return tuple(spent)


async def passes(group: TrainerGroup, trainer: AsyncTrainingClient) -> Iterator[Figure]:
    """How often ranks are called in a step of few tokens, and in one of many."""
    gather, made = group._gather, []

    async def counting(ranks: Any, name: str, *given: Any) -> Any:
        made.append(name)
        return await gather(ranks, name, *given)

    group._gather = counting  # type: ignore[method-assign]
    figures = []
    for count, tokens in ((1, 8), (32, 128)):
        made.clear()
        await step(trainer, count, tokens)
        figures.append(Figure(f"calls in a step of {count * tokens} tokens", (len(made),), "", 2))
    del group._gather
    return iter(figures)


async def kills(group: TrainerGroup, trainer: AsyncTrainingClient, smoke: bool) -> list[Figure]:
    """How long a step takes whose rank is killed, beyond one of which none is."""
    names = {"stopped": "it is known", "ready": "ranks are there", "": "its run goes on"}
    parts: dict[str, list[float]] = {state: [] for state in names}
    began = 0.0

    def changed() -> None:
        if group.state in parts:
            parts[group.state].append(time.monotonic() - began)

    group._changed = changed
    for number in range(1 if smoke else KILLS):
        assert group.ranks is not None
        began = time.monotonic()
        os.kill(group.ranks.facts[number % 2].pid, signal.SIGKILL)
        await step(trainer, 8, 64)
        parts[""].append(time.monotonic() - began)
    return [
        Figure(f"a rank is killed: {names[state]} after", tuple(spent), "s", 30.0)
        for state, spent in parts.items()
    ]


def figures(smoke: bool) -> Iterator[Figure]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(cluster(folder))

        async def run() -> list[Figure]:
            with anyio.fail_after(WITHIN_S * (1 if smoke else KILLS)):
                return await measure(engine, folder, smoke)

        yield from anyio.run(run)
