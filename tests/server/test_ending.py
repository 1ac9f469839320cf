"""The end of much at once is one commit: of a session's samples, of what waits, of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import FORWARD, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_durability import SAMPLE
from tests.server.test_service import Recorder
from weaver.protocol import Sampled
from weaver.server.journal import Journal
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weaver.server.records import Settled
    from weaver.types import TrainingRun

pytestmark = pytest.mark.anyio


class Counting(Journal):
    """Notes how many outcomes come with each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[int] = []

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        self.commits.append(len(settled))
        await super().settle(settled, runs=runs)


@pytest.mark.parametrize("what", ["samples", "behind a gap", "of a run"])
async def test_the_end_of_many_is_one_commit(home: Path, what: str) -> None:
    store, record = Counting(), Recorder()
    async with LocalService(FakeEngine(hook=record), home=home, store=store) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        if what == "samples":
            record.hold = "load_sampler"
            await caller.start(SAMPLE)
            await record.until_held()
            await caller.send(*(caller.stamp(SAMPLE) for _ in range(500)))
        else:
            caller.stamp(FORWARD, run)  # never sent
            await caller.send(*(caller.stamp(FORWARD, run) for _ in range(500)))
        store.commits.clear()
        if what == "of a run":
            await service.delete_run(run)
        else:
            await service.close_session(caller.session_id)
        record.go_on.set()
        assert [one for one in store.commits if one] == [501 if what == "samples" else 500]


async def test_samples_that_are_cancelled_while_others_begin_end_nothing_else(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        caller = await Caller.open(service)
        await caller.do(SAMPLE, Sampled)  # its weights are ready
        for _ in range(20):
            ids = await caller.send(*(caller.stamp(SAMPLE) for _ in range(50)))
            await service.cancel(caller.session_id, [*ids[::2], *ids[::2]])  # each named twice
            for one in ids:
                await caller.outcome(one)
        await caller.do(SAMPLE, Sampled)
