"""What is refused above a limit, before anything changes: natively and over HTTP."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

from tests.contracts.caller import FORWARD, GRADIENT, HELLO, STEP, TEXT
from tests.contracts.caller import Caller as Client
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import ADDRESS, running
from tests.server.test_service import Recorder
from weaver import wire
from weaver.client.http import HttpService
from weaver.errors import NotFoundError, QuotaExceededError, TooLargeError
from weaver.protocol import (
    MEDIA_TYPE,
    NEXT_OFFSET,
    CheckpointSaved,
    CreateModel,
    ForwardBackward,
    GradientsDone,
    ModelCreated,
    ReleaseSampler,
    Sample,
    Sampled,
    SamplerReleased,
    SaveCheckpoint,
    StepDone,
)
from weaver.server import intake, recovery
from weaver.server.database import open_database
from weaver.server.http.telemetry import ServerMetrics
from weaver.server.journal import Journal
from weaver.server.keys import Caller
from weaver.server.service import LocalService
from weaver.server.settings import Durability, Limits
from weaver.tensors import TensorData
from weaver.types import Datum, MetricPoint, ModelInput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from weaver.protocol import Service
    from weaver.server.view import View

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
async def test_bytes_that_wait_or_were_not_collected(home: Path, kind: str) -> None:
    record = Recorder()
    limits = Limits(pending_bytes=100_000)
    async with projects(kind, home, limits, engine=FakeEngine(hook=record)) as (a, b):
        client, other = await Client.open(a), await Client.open(b)
        record.hold = "load_sampler"
        sample = Sample(sampler_id="base:fake", prompt="x" * 40_000)
        taken = await client.send(*(client.stamp(sample) for _ in range(2)))
        await record.until_held()
        third = client.stamp(sample)
        with pytest.raises(QuotaExceededError, match="bytes"):
            await client.send(third)
        with pytest.raises(TooLargeError, match="100000"):
            await client.send(client.stamp(sample.model_copy(update={"prompt": "x" * 100_001})))
        await other.send(other.stamp(sample))  # another project's bytes are its own
        record.go_on.set()
        for submission_id in taken:
            await client.outcome(submission_id)
        await client.send(third)


async def test_outcomes_count_until_they_are_collected(home: Path) -> None:
    long = ForwardBackward(datums=(HELLO,) * 500, loss_fn="cross_entropy", backward=False)
    async with LocalService(FakeEngine(), home=home, limits=Limits(pending_bytes=2**20)) as service:
        client = await Client.open(service)
        run = await client.create()
        [session] = service.parts.registry.sessions.values()
        before = session.held_bytes
        sent = client.stamp(long, run)
        await client.send(sent)
        assert session.held_bytes - before > wire.about_bytes(sent) * 0.99
        outcome = await client.outcome(sent.id)
        assert session.held_bytes - before >= 500 * 4 * len(TEXT[:-1])
        await service.collect(client.session_id, after=outcome.cursor, timeout_s=0)
        assert session.held_bytes == 0
        assert service.parts.activity.held_bytes == 0


async def saved(service: View, run: str) -> None:
    for _ in range(1000):
        known = service.parts.registry.runs[run]
        if known.unsaved_bytes == 0 and not known.committing.locked():
            return
        await anyio.sleep(0.01)
    raise AssertionError("no snapshot was taken")


async def test_gradient_passes_that_no_snapshot_holds(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "UNSAVED_BYTES", 10_000)
    database = open_database(home)
    limits, often = Limits(pending_bytes=20_000), Durability(snapshot_every_s=0.0)
    passes = ForwardBackward(datums=(HELLO,) * 20, loss_fn="cross_entropy")
    async with LocalService(
        FakeEngine(), home=home, store=Journal(database), limits=limits, durability=often
    ) as service:
        client = await Client.open(service)
        run = await client.create()
        for _ in range(50):
            ended = await client.outcome(await client.start(passes, run))
            if ended.error is not None:
                break
        assert ended.error is not None
        assert ended.error.code == QuotaExceededError.code
        assert await client.refused(STEP, run_id=run) == "gradients_discarded"
        await saved(service, run)
        for _ in range(20):  # no more than a step is needed in between
            await client.do(passes, GradientsDone, run_id=run)
            await client.do(STEP, StepDone, run_id=run)
            await saved(service, run)
    database.dispose()


@pytest.mark.parametrize("many", [False, True], ids=["large", "many"])
async def test_what_is_large_is_looked_at_beside_the_event_loop(
    home: Path, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    threads: set[int] = set()

    def noting(work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return work(*args, **kwargs)

        return noted

    for name in ("fingerprint", "refusal"):
        monkeypatch.setattr(intake, name, noting(getattr(intake, name)))
    tokens = [1] * 20_000
    datum = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": tokens})
    operation = ForwardBackward(
        datums=(HELLO,) * 1000 if many else (datum,), loss_fn="cross_entropy"
    )
    async with LocalService(FakeEngine(), home=home) as service:
        client = await Client.open(service)
        run = await client.create()
        threads.clear()
        await client.start(operation, run)
        assert threads
        assert threading.get_ident() not in threads


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
        for more in (
            {"top_logprobs": 1},
            {"prompt_top_logprobs": 2},
            {"prompt_targets": TensorData([[1, 2], [3, 4]])},
        ):
            assert (
                await client.refused(much.model_copy(update={"num_samples": 1, **more}))
                == "too_large"
            )
        assert await client.refused(GRADIENT, run_id=run) == "too_large"
        targets = {"target_tokens": [[1] * 5] * 2, "weights": [[1] * 5] * 2}
        wide = Datum(model_input=[1, 2], loss_fn_inputs=targets)
        several = GRADIENT.model_copy(update={"datums": (wide,)})
        assert await client.refused(several, run_id=run) == "too_large"
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


@EVERYWHERE
async def test_open_sessions(home: Path, kind: str) -> None:
    async with projects(kind, home, Limits(sessions=2)) as (a, b):
        first, _ = await a.open_session(), await a.open_session()
        with pytest.raises(QuotaExceededError, match="2 open sessions"):
            await a.open_session()
        await b.open_session()  # another project's are its own
        await a.close_session(first.session_id)
        await a.open_session()


async def test_sessions_that_come_at_once_are_counted(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home, limits=Limits(sessions=3)) as service:
        refused = []

        async def open_one() -> None:
            try:
                await service.open_session()
            except QuotaExceededError as error:
                refused.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(open_one)
        assert len(refused) == 7
        await service.open_session(lasting=True)  # of a wire format without sessions


@EVERYWHERE
async def test_metrics_of_a_run(home: Path, kind: str) -> None:
    def points(count: int, name: str = "loss") -> list[MetricPoint]:
        return [MetricPoint(name=name, value=float(i)) for i in range(count)]

    limits = Limits(metric_points=10, metric_names=2)
    async with projects(kind, home, limits) as (a, _):
        client = await Client.open(a)
        run = await client.create()
        await a.log_metrics(run, points(6))
        with pytest.raises(TooLargeError, match="11 logged numbers"):
            await a.log_metrics(run, points(5))
        await a.log_metrics(run, points(4, "other"))
        other = await client.create()
        with pytest.raises(TooLargeError, match="3 names"):
            await a.log_metrics(other, [p for name in "xyz" for p in points(1, name)])
        assert len(await a.read_metrics(run)) == 10
        assert await a.read_metrics(other) == []


async def test_metrics_are_read_page_by_page(home: Path) -> None:
    async with running(home) as server, server.http() as http:
        service = HttpService(ADDRESS, transport=server.transport(), outage_s=0.0)
        client = await Client.open(service)
        run = await client.create()
        logged = [MetricPoint(name="ab"[i % 2], value=float(i)) for i in range(7)]
        await service.log_metrics(run, logged)
        first = await http.get(f"/v1/runs/{run}/metrics", params={"limit": 3})
        assert [p["value"] for p in first.json()] == [0.0, 1.0, 2.0]
        assert first.headers[NEXT_OFFSET] == "3"
        rest = await http.get(f"/v1/runs/{run}/metrics", params={"limit": 3, "offset": 6})
        assert [p["value"] for p in rest.json()] == [6.0]
        assert NEXT_OFFSET not in rest.headers
        assert (await http.get(f"/v1/runs/{run}/metrics", params={"limit": 0})).status_code == 422
        assert [p.value for p in await service.read_metrics(run, name="b")] == [1.0, 3.0, 5.0]
        await service.aclose()


async def test_a_client_reads_every_page(home: Path) -> None:
    pages: list[str] = []

    class Short(httpx.AsyncBaseTransport):
        """Asks for short pages, as a server with a lower bound would answer."""

        def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
            self.inner = inner

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "GET" and request.url.path.endswith("/metrics"):
                request.url = request.url.copy_merge_params({"limit": "3"})
                pages.append(request.url.params.get("offset", "0"))
            return await self.inner.handle_async_request(request)

    async with running(home) as server:
        service = HttpService(ADDRESS, transport=Short(server.transport()), outage_s=0.0)
        client = await Client.open(service)
        run = await client.create()
        await service.log_metrics(run, [MetricPoint(name="a", value=float(i)) for i in range(7)])
        assert [p.value for p in await service.read_metrics(run)] == [float(i) for i in range(7)]
        assert pages == ["0", "3", "6"]
        await service.aclose()


async def test_journaled_bytes_are_counted_over_a_restart_and_shown(home: Path) -> None:
    database, never = open_database(home), Durability(snapshot_every_steps=1000)
    passes = ForwardBackward(datums=(HELLO,) * 20, loss_fn="cross_entropy")
    counted = []
    for _ in range(2):
        store = Journal(database)
        async with LocalService(FakeEngine(), home=home, store=store, durability=never) as service:
            if not counted:
                client = await Client.open(service)
                run = await client.create()
                await client.do(passes, GradientsDone, run_id=run)
            counted.append(service.parts.activity.unsaved_bytes)
            shown = ServerMetrics(service.parts.activity, service.parts.engine).render().decode()
            assert f"weaver_journaled_bytes {float(counted[-1])}" in shown
    assert counted[0] > 1000
    assert counted[1] == pytest.approx(counted[0], rel=0.5)  # about, and in bytes on the wire
    database.dispose()


@EVERYWHERE
async def test_a_sequence_too_long_to_train_is_named_before_it_is_queued(
    home: Path, kind: str
) -> None:
    record = Recorder()
    engine = FakeEngine(hook=record, max_tokens_trained=HELLO.model_input.length)
    longer = Datum(model_input=TEXT, loss_fn_inputs={"target_tokens": TEXT})
    operation = ForwardBackward(datums=(HELLO, longer), loss_fn="cross_entropy")
    async with projects(kind, home, Limits(), engine=engine) as (a, _):
        client = await Client.open(a)
        run = await client.create()
        with pytest.raises(TooLargeError, match="has 11 tokens, at most 10 can") as raised:
            await client.do(operation, GradientsDone, run_id=run)
        assert raised.value.field == "datums[1].model_input" and raised.value.hint
        assert record.count("gradient") == 0
        forward = operation.model_copy(update={"backward": False})
        for fits in (forward, GRADIENT):
            await client.do(fits, GradientsDone, run_id=run)


async def test_an_operator_may_bound_what_is_trained_below_what_fits(home: Path) -> None:
    limits = Limits(tokens_trained=9)
    async with LocalService(FakeEngine(), home=home, limits=limits) as service:
        client = await Client.open(service)
        run = await client.create()
        with pytest.raises(TooLargeError, match="at most 9 can") as raised:
            await client.do(GRADIENT, GradientsDone, run_id=run)
        assert raised.value.field == "datums[0].model_input"
