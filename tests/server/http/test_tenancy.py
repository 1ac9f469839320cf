"""Keys and projects: who gets in, and what each sees. Every route that takes an id is tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
import sqlalchemy as sa

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.server.http.helpers import running
from tests.server.test_durability import until
from weaver.errors import (
    AuthenticationError,
    CheckpointNotFoundError,
    InvalidNameError,
    NotFoundError,
    RunNotFoundError,
    ServiceConnectionError,
)
from weaver.exchange import Selection
from weaver.protocol import (
    CreateModel,
    GradientsDone,
    LoadCheckpoint,
    OpenSampler,
    Sample,
    StepDone,
    Submission,
)
from weaver.server.database import open_database
from weaver.server.http import gateway
from weaver.server.journal import Journal
from weaver.server.keys import Caller as Rights
from weaver.server.keys import Keys
from weaver.server.records import SessionRecord
from weaver.types import MetricPoint, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.server.http.helpers import Server
    from weaver.client.http import HttpService
from weaver.protocol import Operation

pytestmark = pytest.mark.anyio
SHORT = SamplingParams(max_tokens=2)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(home: Path) -> AsyncIterator[Server]:
    async with running(home, auth=True) as server:
        yield server


def login(server: Server, project: str, *, admin: bool = False) -> HttpService:
    return server.client(server.keys.create(project, admin=admin)[1])


class Tenant:
    """A project with a run, a checkpoint and a sampler."""

    caller: Caller
    run: str
    path: str

    @classmethod
    async def settle(cls, service: HttpService) -> Tenant:
        self = cls()
        self.caller = await Caller.open(service)
        self.run = await self.caller.create()
        await self.caller.do(GRADIENT, GradientsDone, run_id=self.run)
        await self.caller.do(STEP, StepDone, run_id=self.run)
        self.path = await self.caller.save(self.run, "sampler", name="x")
        await service.log_metrics(self.run, [MetricPoint(name="loss", value=1)])
        return self


async def test_a_revoked_key_is_good_for_a_moment_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "KEY_S", 0.2)
    info, secret = server.keys.create("alice")
    async with server.http(secret) as client:
        assert (await client.get("/v1/runs")).status_code == 200
        server.keys.revoke(info.id)
        await anyio.sleep(0.25)
        assert (await client.get("/v1/runs")).status_code == 401


async def test_without_a_valid_key_nothing_is_answered(server: Server) -> None:
    info, secret = server.keys.create("alice")
    server.keys.revoke(info.id)
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wv-nothing"},
        {"Authorization": f"Basic {secret}"},
        {"Authorization": f"Bearer {secret}"},
        {"Authorization": b"Bearer w\xe9v"},
        {"X-WEAVER-API-KEY": "x"},
    ):
        async with server.http() as http:
            for path in ("/v1/base-models", "/v1/runs", "/metrics", "/v1/nowhere"):
                reply = await http.get(path, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "unauthenticated"
                assert reply.headers["WWW-Authenticate"] == "Bearer"
                assert secret not in reply.text
            assert (await http.get("/healthz", headers=headers)).status_code == 200
    with pytest.raises(AuthenticationError, match="WEAVER_API_KEY"):
        await server.client().open_session()


async def test_both_headers_let_in(server: Server) -> None:
    _, secret = server.keys.create("alice")
    async with server.http() as http:
        for headers in ({"Authorization": f"bearer {secret}"}, {"X-WEAVER-API-KEY": secret}):
            assert (await http.get("/v1/runs", headers=headers)).status_code == 200


async def test_metrics_are_for_administrators(server: Server) -> None:
    for admin, status in ((False, 403), (True, 200)):
        async with server.http(server.keys.create("a", admin=admin)[1]) as http:
            assert (await http.get("/metrics")).status_code == status


async def test_a_project_sees_nothing_of_another(server: Server) -> None:
    async with login(server, "alice") as alice, login(server, "bob") as bob:
        hers = await Tenant.settle(alice)
        session, run, path = hers.caller.session_id, hers.run, hers.path
        assert await bob.list_runs() == [] and await bob.list_checkpoints() == []
        assert session not in [s.session_id for s in await bob.list_sessions()]
        for missing in (
            lambda: bob.get_run(run),
            lambda: bob.list_checkpoints(run),
            lambda: bob.read_metrics(run),
            lambda: bob.log_metrics(run, []),
            lambda: bob.stop_run(run),
            lambda: bob.delete_run(run, checkpoints=True),
        ):
            with pytest.raises(RunNotFoundError):
                await missing()
        everything = Selection(pattern="*")
        assert await bob.delete_checkpoints(everything) == []
        with pytest.raises(RunNotFoundError):
            await bob.delete_checkpoints(Selection(run_id=run))
        for lost in (
            lambda: bob.get_checkpoint(path),
            lambda: bob.delete_checkpoint(path),
            lambda: bob.set_checkpoint_ttl(path, 1),
            lambda: bob.export_checkpoint(path),
            lambda: bob.export_checkpoint(path, merge=True),
            lambda: bob.read_exported(path, "state.json"),
        ):
            with pytest.raises(CheckpointNotFoundError):
                await lost()
        submission = hers.caller.stamp(Sample(sampler_id="base:fake", prompt="x", stream=True))
        await alice.submit(session, [submission])
        for strange in (
            lambda: bob.submit(session, [submission]),
            lambda: bob.collect(session, after=0, timeout_s=0),
            lambda: bob.cancel(session, [submission.id]),
            lambda: anext(aiter(bob.stream(session, submission.id))),
        ):
            with pytest.raises(NotFoundError):
                await strange()
        await bob.close_session(session)  # says nothing, does nothing
        assert (await hers.caller.outcome(submission.id)).result is not None
        assert [c.path for c in await alice.list_checkpoints(run)] == [path]


async def test_the_console_shows_nothing_of_another(server: Server) -> None:
    _, secret = server.keys.create("bob")
    async with login(server, "alice") as alice, server.http(secret) as bob:
        run = (await Tenant.settle(alice)).run
        for route in ("operations", "curves"):
            there = await bob.get(f"/v1/runs/{run}/{route}")
            absent = await bob.get(f"/v1/runs/run-000000000000/{route}")
            assert there.status_code == absent.status_code == 404
            message = there.json()["error"]["message"]
            assert message.replace(run, "run-000000000000") == absent.json()["error"]["message"]
        assert (await bob.get("/v1/load")).status_code == 403


async def test_operations_on_what_is_anothers_end_as_on_what_is_nowhere(server: Server) -> None:
    async with login(server, "alice") as alice, login(server, "bob") as bob:
        hers, his = await Tenant.settle(alice), await Tenant.settle(bob)
        caller = his.caller

        async def said(operation: Operation, run_id: str | None = None) -> str:
            outcome = await caller.outcome(await caller.start(operation, run_id))
            assert outcome.error is not None
            return str(outcome.error.to_error())

        foreign, nowhere = hers.path, hers.path.replace(hers.run, "run-000000000000")
        for make in (
            lambda path: (OpenSampler(model_path=path), None),
            lambda path: (Sample(sampler_id=path, prompt="x", params=SHORT), None),
            lambda path: (LoadCheckpoint(path=path), his.run),
        ):
            there, absent = await said(*make(foreign)), await said(*make(nowhere))
            assert there.replace(hers.run, "") == absent.replace("run-000000000000", "")
        there, absent = await said(STEP, hers.run), await said(STEP, "run-000000000000")
        assert there.replace(hers.run, "") == absent.replace("run-000000000000", "")
        # The refused operations took their places, in his order only.
        await caller.do(GRADIENT, GradientsDone, run_id=his.run)
        await hers.caller.do(GRADIENT, GradientsDone, run_id=hers.run)
        assert (await hers.caller.do(STEP, StepDone, run_id=hers.run)).output.metrics["step"] == 2


async def test_an_administrator_sees_all(server: Server) -> None:
    async with login(server, "alice") as alice, login(server, "ops", admin=True) as admin:
        hers = await Tenant.settle(alice)
        assert [run.run_id for run in await admin.list_runs()] == [hers.run]
        assert (await admin.get_checkpoint(hers.path)).run_id == hers.run


async def test_checkpoints_stay_their_projects_after_a_restart(home: Path) -> None:
    async with running(home, auth=True) as first, login(first, "alice") as alice:
        path = (await Tenant.settle(alice)).path
    async with running(home, auth=True) as second:
        async with login(second, "alice") as alice, login(second, "bob") as bob:
            assert [c.path for c in await alice.list_checkpoints()] == [path]
            assert (await alice.get_checkpoint(path)).folder is None
            assert await bob.list_checkpoints() == []


@pytest.mark.parametrize("file", ["weight.npy", "manifest.json"])
async def test_an_error_does_not_tell_where_the_server_keeps_things(
    server: Server, home: Path, file: str
) -> None:
    async with login(server, "alice") as alice:
        hers = await Tenant.settle(alice)
        path = await hers.caller.save(hers.run, name="y")
        (home / "runs" / hers.run / "weights" / "y" / file).write_bytes(b"")
        handle = await hers.caller.start(LoadCheckpoint(path=path), hers.run)
        error = (await hers.caller.outcome(handle)).error
        assert error is not None and error.code == "checkpoint_corrupt"
        assert file in error.message and str(home) not in str(error)


async def test_folders_of_the_server_cannot_be_named(server: Server, home: Path) -> None:
    async with login(server, "alice") as alice:
        hers = await Tenant.settle(alice)
        folder = str(home / "runs" / hers.run / "sampler" / "x")
        caller = hers.caller
        assert await caller.refused(OpenSampler(model_path=folder)) == "checkpoint_not_found"
        assert await caller.refused(OpenSampler(base_model=folder)) == "unknown_model"
        assert await caller.refused(CreateModel(base_model=folder)) == "unknown_model"
        assert await caller.refused(Sample(sampler_id=folder, prompt="x")) == "not_found"
        load = LoadCheckpoint(path=folder)
        assert await caller.refused(load, run_id=hers.run) == "checkpoint_not_found"


async def test_what_was_refused_is_refused_after_a_restart(home: Path) -> None:
    async with running(home, auth=True) as first, login(first, "alice") as alice:
        hers = await Tenant.settle(alice)
    database = open_database(home)
    store, bob = Journal(database), Rights("bob")
    await store.open_session(SessionRecord("s", bob))
    foreign = (
        Submission(id="1", operation=STEP, run_id=hers.run, seq=1),
        Submission(id="2", operation=Sample(sampler_id=hers.path, prompt="x")),
        Submission(id="3", operation=OpenSampler(model_path=str(home))),
        Submission(id="4", operation=CreateModel(base_model="fake")),
    )
    await store.append("s", foreign)  # accepted, and then the server was killed
    await store.open_session(SessionRecord("closed", bob))
    await store.append("closed", [foreign[0], foreign[3]])
    await store.close_session("closed")
    database.dispose()
    async with running(home, auth=True) as second:
        async with login(second, "bob") as his, login(second, "alice") as alice:
            caller = Caller(his, "s")
            errors = [(await caller.outcome(one.id)).error for one in foreign]
            assert [error and error.code for error in errors] == [
                "run_not_found",
                "checkpoint_not_found",
                "checkpoint_not_found",
                None,
            ]

            async def both_created() -> bool:
                return len(await his.list_runs()) == 2

            await until(both_created)
            [run] = await alice.list_runs()
            assert run.run_id == hers.run and run.step == 1 and run.project == "alice"


async def test_a_session_has_its_callers_rights_only(server: Server) -> None:
    async with (
        login(server, "ops", admin=True) as admin,
        login(server, "ops") as member,
        login(server, "alice") as alice,
    ):
        hers = await Tenant.settle(alice)
        session = (await admin.open_session()).session_id
        with pytest.raises(NotFoundError):
            await member.submit(session, [])
        assert session not in [one.session_id for one in await member.list_sessions()]
        assert session in [one.session_id for one in await admin.list_sessions()]
        # An administrator in a tenant's session:
        theirs = Caller(admin, hers.caller.session_id, hers.caller.cursor)
        other = await (await Caller.open(admin)).create()
        assert await theirs.refused(STEP, run_id=other) == "run_not_found"


async def test_a_deleted_runs_checkpoints_stay_its_projects(home: Path) -> None:
    async with running(home, auth=True) as first, login(first, "alice") as alice:
        hers = await Tenant.settle(alice)
        await alice.delete_run(hers.run)
    async with running(home, auth=True) as second:
        async with login(second, "alice") as alice, login(second, "bob") as bob:
            assert [c.path for c in await alice.list_checkpoints()] == [hers.path]
            assert await bob.list_checkpoints() == []
            with pytest.raises(CheckpointNotFoundError):
                await bob.get_checkpoint(hers.path)


async def test_a_database_that_is_away_is_named_to_whoever_asks(server: Server) -> None:
    server.gateway.keys = Keys(sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    async with server.http("wv-x") as http:
        reply = await http.get("/v1/runs")
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
        assert reply.json()["error"]["code"] == "connection_failed"
    with pytest.raises(ServiceConnectionError, match="cannot be reached"):
        server.gateway.keys.list()


def test_keys_are_hashed_and_shown_once(home: Path) -> None:
    database = open_database(home)
    keys = Keys(database)
    info, secret = keys.create("alice", name="laptop")
    assert secret.startswith("wv-") and len(secret) >= 46
    assert keys.authenticate(secret).project == "alice"
    stored = b"".join(path.read_bytes() for path in home.iterdir())
    assert (
        b"alice" in stored and secret.encode() not in stored and secret[3:].encode() not in stored
    )
    assert (home / "server.db").stat().st_mode & 0o077 == 0
    assert [key.revoked_at for key in keys.list()] == [None]
    keys.revoke(info.id)
    assert [key.revoked_at is None for key in keys.list()] == [False]
    with pytest.raises(AuthenticationError):
        keys.authenticate(secret)
    for bad in ("", "../x", "a b", "x" * 65):
        with pytest.raises(InvalidNameError):
            keys.create(bad)
    database.dispose()
