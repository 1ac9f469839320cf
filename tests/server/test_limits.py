"""What is refused above a limit, before anything changes: natively and over HTTP."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import FORWARD, GRADIENT, STEP
from tests.contracts.caller import Caller as Client
from tests.server.http.helpers import ADDRESS, running
from tests.server.test_service import Recorder
from weaver import wire
from weaver.client.http import MEDIA_TYPE, HttpService
from weaver.engine.fake import FakeEngine
from weaver.errors import NotFoundError, QuotaExceededError, TooLargeError
from weaver.protocol import (
    CheckpointSaved,
    CreateModel,
    GradientsDone,
    ModelCreated,
    ReleaseSampler,
    Sample,
    Sampled,
    SamplerReleased,
    SaveCheckpoint,
)
from weaver.server.limits import Limits
from weaver.server.service import LocalService
from weaver.server.tenancy import Caller
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from weaver.protocol import Service

pytestmark = pytest.mark.anyio
EVERYWHERE = pytest.mark.parametrize("kind", ["native", "http"])
CREATE = CreateModel(base_model="fake")
HI = ModelInput.from_ints(list(b"hi"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def projects(
    kind: str, home: Path, limits: Limits, *, engine: FakeEngine | None = None
) -> AsyncIterator[tuple[Service, Service]]:
    """The views of two projects."""
    engine = engine or FakeEngine()
    if kind == "native":
        async with LocalService(engine, home=home, limits=limits) as service:
            yield service.seen_by(Caller("a")), service.seen_by(Caller("b"))
        return
    async with running(home, engine=engine, auth=True, limits=limits) as server:
        secrets = [server.keys.create(project)[1] for project in ("a", "b")]
        first, second = (
            HttpService(ADDRESS, api_key=key, transport=server.transport(), outage_s=0.0)
            for key in secrets
        )
        async with first, second:
            yield first, second


@EVERYWHERE
async def test_pending_operations(home: Path, kind: str) -> None:
    record = Recorder()
    engine = FakeEngine(hook=record)
    async with projects(kind, home, Limits(pending_operations=3), engine=engine) as (a, b):
        client, other = await Client.open(a), await Client.open(b)
        run = await client.create()
        record.hold = "forward_backward"
        taken = [client.stamp(FORWARD, run) for _ in range(2)]
        await client.send(*taken)  # the outcome of create_model is not acknowledged yet
        fourth = client.stamp(FORWARD, run)
        with pytest.raises(QuotaExceededError, match="the limit of a project is 3"):
            await client.send(fourth)
        await client.send(*taken)  # a resend needs no room
        waiting = await other.start(CREATE)
        [session] = await a.list_sessions()
        assert session.pending == 2
        record.go_on.set()
        assert isinstance(await other.result(waiting), ModelCreated)
        for submission in taken:
            await client.result(submission.id)
        await client.send(fourth)
        assert isinstance(await client.result(fourth.id), GradientsDone)
        await client.do(FORWARD, GradientsDone, run_id=run)


async def test_a_client_waits_while_too_much_is_pending(home: Path) -> None:
    async with running(home, limits=Limits(pending_operations=2)) as server:
        async with server.client() as service, server.http() as http:
            client = await Client.open(service)
            run = await client.create()
            first, second = client.stamp(FORWARD, run), client.stamp(FORWARD, run)
            await client.send(first)
            reply = await http.post(
                f"/v1/sessions/{client.session_id}/submissions",
                content=wire.encode([second]),
                headers={"Content-Type": MEDIA_TYPE},
            )
            assert reply.status_code == 429 and reply.headers["Retry-After"] == "1"
            assert "limit of a project is 2" in reply.json()["error"]["message"]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.send, second)
                await anyio.sleep(0.1)
                await client.result(first.id)
                assert isinstance(await client.result(second.id), GradientsDone)


@EVERYWHERE
async def test_tokens_of_an_operation(home: Path, kind: str) -> None:
    async with projects(kind, home, Limits(operation_tokens=9)) as (a, _):
        client = await Client.open(a)
        run = await client.create()
        much = Sample(
            sampler_id="base:fake", prompt=HI, params=SamplingParams(max_tokens=5), num_samples=2
        )
        assert await client.refused(much) == "too_large"
        await client.do(much.model_copy(update={"num_samples": 1}), Sampled)
        assert await client.refused(GRADIENT, run_id=run) == "too_large"
        assert await client.refused(STEP, run_id=run) == "gradients_discarded"


@EVERYWHERE
async def test_runs_of_a_project(home: Path, kind: str) -> None:
    async with projects(kind, home, Limits(runs=1)) as (a, b):
        client, other = await Client.open(a), await Client.open(b)
        run = await client.create()
        assert await client.refused(CREATE) == "quota_exceeded"
        await other.create()
        await a.delete_run(run)
        await client.create()


@EVERYWHERE
async def test_stored_bytes_of_a_project(home: Path, kind: str) -> None:
    async with projects(kind, home, Limits(stored_bytes=1)) as (a, b):
        client, other = await Client.open(a), await Client.open(b)
        run = await client.create()
        path = await client.save(run, name="x")
        for purpose in ("state", "sampler"):
            save = SaveCheckpoint.model_validate({"purpose": purpose, "name": "y"})
            assert await client.refused(save, run_id=run) == "quota_exceeded"
        await other.save(await other.create(), name="x")
        await a.delete_checkpoint(path)
        save = SaveCheckpoint(purpose="sampler", name="y")
        named = await client.do(save, CheckpointSaved, run_id=run)
        await a.delete_checkpoint(named.checkpoint.path)
        if kind == "http":  # there, samplers without a name are on the disk too
            unnamed = await client.save(run, "sampler")
            assert await client.refused(save, run_id=run) == "quota_exceeded"
            await client.do(ReleaseSampler(sampler_id=unnamed), SamplerReleased)
            await client.do(save, CheckpointSaved, run_id=run)


async def test_streams_that_nobody_reads_are_bounded(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        client = await Client.open(service)
        params = SamplingParams(max_tokens=2)
        sample = Sample(sampler_id="base:fake", prompt=HI, params=params, stream=True)
        ids = await client.send(*(client.stamp(sample) for _ in range(100)))
        for submission_id in ids:
            await client.result(submission_id)
        await service.collect(client.session_id, after=client.cursor, timeout_s=0)
        assert [piece async for piece in service.stream(client.session_id, ids[-1])]
        with pytest.raises(NotFoundError, match="no streamed sample"):
            await anext(aiter(service.stream(client.session_id, ids[0])))


async def test_a_refused_pass_is_not_computed(home: Path) -> None:
    record = Recorder()
    async with LocalService(
        FakeEngine(hook=record), home=home, limits=Limits(operation_tokens=9)
    ) as service:
        client = await Client.open(service)
        run = await client.create()
        assert await client.refused(GRADIENT, run_id=run) == "too_large"
        assert record.count("forward_backward") == 0
        assert await client.refused(STEP, run_id=run) == "gradients_discarded"
        assert (await service.get_run(run)).step == 0


@EVERYWHERE
async def test_metadata(home: Path, kind: str) -> None:
    async with projects(kind, home, Limits(metadata_bytes=100)) as (a, _):
        client = await Client.open(a)
        small, large = {"about": "x" * 80}, {"about": "x" * 110}
        await client.do(CreateModel(base_model="fake", user_metadata=small), ModelCreated)
        await a.open_session(user_metadata=small)
        create = CreateModel(base_model="fake", user_metadata=large)
        assert await client.refused(create) == "too_large"
        with pytest.raises(TooLargeError, match=r"user_metadata: has 123 bytes.*is 100"):
            await a.open_session(user_metadata=large)
        assert len(await a.list_runs()) == 1
        assert len(await a.list_sessions()) == 2
