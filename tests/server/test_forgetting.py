"""What of an open session's finished operations is kept, and that order outlives the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.contracts.caller import BAD_GRADIENT, GRADIENT, STEP, Caller
from tests.server.test_durability import ALWAYS, NEVER, SAMPLE, server, train, until
from weaver.errors import ConflictError
from weaver.protocol import GradientsDone, Sampled, StepDone
from weaver.server import journal, sessions
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.tables import operations

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.server.settings import Durability
    from weaver.server.view import View

pytestmark = pytest.mark.anyio


def rows(home: Path) -> int:
    database = open_database(home)
    try:
        with database.begin() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(operations)) or 0
    finally:
        database.dispose()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes are acknowledged to the journal one by one."""
    monkeypatch.setattr(journal, "ACKNOWLEDGED", 1)


async def test_what_a_snapshot_holds_is_forgotten_while_its_session_is_open(home: Path) -> None:
    async with server(home, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=20)

        async def forgotten() -> bool:
            await train(caller, run, steps=1)  # a snapshot follows, in its own time
            return rows(home) <= 12

        await until(forgotten)
        step = (await service.get_run(run)).step
    async with server(home, durability=ALWAYS) as service:
        caller.service = service
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == step + 1


async def test_samples_that_were_collected_are_forgotten_but_not_the_cursor(home: Path) -> None:
    async with server(home) as service:
        caller = await Caller.open(service)
        for _ in range(20):
            await caller.do(SAMPLE, Sampled)
    assert rows(home) <= 3
    async with server(home) as service:
        caller.service = service
        await caller.do(SAMPLE, Sampled)


@pytest.mark.parametrize("gap", [False, True])
async def test_what_was_refused_is_passed_over_without_being_read(home: Path, gap: bool) -> None:
    async with server(home, durability=NEVER) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        late = caller.stamp(GRADIENT, run) if gap else None
        withdrawn = [await caller.start(None, run) for _ in range(20)]
        for one in withdrawn:
            await caller.outcome(one)
        await caller.do(SAMPLE, Sampled)
        await caller.do(SAMPLE, Sampled)
    database = open_database(home)
    try:
        store = Journal(database)
        assert len(await store.entries()) < 6
        [passed] = await store.passed()
        assert passed.last - passed.first >= 18
    finally:
        database.dispose()
    async with server(home, durability=NEVER) as service:
        caller.service = service
        if late is not None:
            await caller.send(late)
            await caller.result(late.id)
        await caller.do(STEP, StepDone, run_id=run)


async def test_a_refusal_that_lost_a_gradient_is_not_forgotten(home: Path) -> None:
    async with server(home, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await train(caller, run, steps=2)
        await caller.refused(BAD_GRADIENT, run_id=run)
        await caller.do(SAMPLE, Sampled)
    async with server(home, durability=ALWAYS) as service:
        caller.service = service
        assert await caller.refused(STEP, run_id=run) == "gradients_discarded"


async def remembered(service: View) -> int:
    [session] = service.parts.registry.sessions.values()
    return len(session._prints) + len(session._places) + len(session._acknowledged)


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_open_session_remembers_what_a_request_may_still_bring(
    home: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    monkeypatch.setattr(sessions, "RESEND_S", 0.0 if not restarted else 600.0)
    async with server(home, durability=NEVER) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        for _ in range(30):
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(SAMPLE, Sampled)
        if not restarted:
            assert await remembered(service) < 10
    monkeypatch.setattr(sessions, "RESEND_S", 0.0)
    async with server(home, durability=NEVER) as service:
        caller.service = service
        await caller.do(STEP, StepDone, run_id=run)
        await caller.do(SAMPLE, Sampled)
        await caller.do(SAMPLE, Sampled)
        assert await remembered(service) < 10
        [session] = service.parts.registry.sessions.values()
        assert session.follow(lambda _: None)[1] == caller.seqs


@pytest.mark.parametrize("durability", [ALWAYS, NEVER])
async def test_what_was_forgotten_is_never_done_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    monkeypatch.setattr(sessions, "RESEND_S", 0.0)
    async with server(home, durability=durability) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        old = caller.stamp(GRADIENT, run)
        await caller.send(old)
        await caller.result(old.id)
        await train(caller, run, steps=3)
        step = (await service.get_run(run)).step
        caller.outcomes.pop(old.id)
        with pytest.raises(ConflictError):  # the journal knows its id, or else the lane its place
            await caller.send(old)
            await caller.result(old.id)
        await train(caller, run, steps=1)
        assert (await service.get_run(run)).step == step + 1


async def test_what_was_refused_before_a_snapshot_is_forgotten_but_not_its_place(
    home: Path,
) -> None:
    async with server(home, durability=ALWAYS) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        withdrawn = [await caller.start(None, run) for _ in range(50)]
        for one in withdrawn:
            await caller.outcome(one)
        await train(caller, run, steps=2)

        async def forgotten() -> bool:
            await train(caller, run, steps=1)
            return rows(home) <= 12

        await until(forgotten)
    async with server(home, durability=ALWAYS) as service:
        caller.service = service
        again = caller.stamp(GRADIENT, run).model_copy(update={"seq": 7})
        await caller.send(again)
        assert (await caller.outcome(again.id)).error is not None
        caller.seqs[run] -= 1
        await train(caller, run, steps=1)


@pytest.mark.parametrize("kept", [False, True], ids=["refused", "executed"])
async def test_the_body_of_what_was_refused_is_not_kept(home: Path, kept: bool) -> None:
    async with server(home, durability=NEVER) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        if kept:
            await caller.do(GRADIENT, GradientsDone, run_id=run)
        else:
            await caller.refused(BAD_GRADIENT, run_id=run)
    database = open_database(home)
    with database.begin() as connection:
        query = sa.select(operations.c.body).where(operations.c.run_id == run)
        assert [body is not None for body in connection.scalars(query)] == [kept]
    database.dispose()
