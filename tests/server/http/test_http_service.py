"""`HttpService`: what it does when replies are lost, late, refused or not ours."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import httpx
import numpy as np
import pytest

from tests.contracts.caller import FORWARD, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import ADDRESS, over_socket, running, serving
from weaver import AsyncServiceClient, Datum, wire
from weaver.client import http, outage
from weaver.client.http import HttpService
from weaver.errors import (
    GradientsDiscardedError,
    InvalidRequestError,
    QuotaExceededError,
    RunNotFoundError,
    ServiceConnectionError,
    TooLargeError,
)
from weaver.protocol import GradientsDone, Sample, StepDone
from weaver.server.settings import Limits, ServerSettings
from weaver.types import MetricPoint, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio
NOT_FOUND = {"error": {"code": "run_not_found", "message": "no run.", "request_id": "r"}}
QUOTA = {"error": {"code": "quota_exceeded", "message": "full.", "request_id": "r"}}
STOPPING = {"error": {"code": "connection_failed", "message": "stopping.", "request_id": "r"}}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(http, "FIRST_CONTACT_S", 0.05)


def scripted(*replies: httpx.Response | Exception) -> tuple[HttpService, list[httpx.Request]]:
    """A service whose server answers as told, the last answer for ever."""
    seen: list[httpx.Request] = []
    queue: Iterator[httpx.Response | Exception] = iter(replies)

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        reply = next(queue, replies[-1])
        if isinstance(reply, Exception):
            raise reply
        return reply

    transport = httpx.MockTransport(answer)
    return HttpService(ADDRESS, api_key="wv-x", transport=transport, outage_s=0.3), seen


async def test_a_lost_reply_is_asked_for_again_with_the_same_key() -> None:
    lost = httpx.ReadError("lost")
    service, seen = scripted(lost, httpx.ConnectError("refused"), httpx.Response(204))
    await service.log_metrics("run", [MetricPoint(name="a", value=1)])
    assert len(seen) == 3
    assert len({request.headers["Idempotency-Key"] for request in seen}) == 1
    assert seen[0].headers["Authorization"] == "Bearer wv-x"


async def test_a_server_out_of_reach_is_named_at_first_contact() -> None:
    service, _ = scripted(httpx.ConnectError("refused"))
    began = anyio.current_time()
    with pytest.raises(ServiceConnectionError, match=rf"{ADDRESS} cannot be reached.*refused"):
        await service.open_session()
    assert anyio.current_time() - began < 0.3


async def test_an_outage_ends_at_its_deadline() -> None:
    service, seen = scripted(httpx.ReadTimeout(""))
    with pytest.raises(ServiceConnectionError, match="ReadTimeout"):
        await service.list_runs()
    assert len(seen) > 5


async def test_a_restart_is_waited_for_as_the_server_says() -> None:
    stopping = httpx.Response(503, json=STOPPING, headers={"Retry-After": "0"})
    service, _ = scripted(stopping, stopping, httpx.Response(200, json=[]))
    assert await service.list_runs() == []
    later = httpx.Response(503, json=STOPPING, headers={"Retry-After": "9"})
    service, seen = scripted(later)
    with pytest.raises(ServiceConnectionError, match=r"stopping\."):
        await service.list_runs()
    assert len(seen) == 1  # nine seconds are beyond its deadline


async def test_a_quota_is_waited_for_only_if_the_server_says_how_long() -> None:
    soon = httpx.Response(429, json=QUOTA, headers={"Retry-After": "0"})
    service, _ = scripted(soon, httpx.Response(200, json=[]))
    assert await service.list_runs() == []
    service, seen = scripted(httpx.Response(429, json=QUOTA))
    with pytest.raises(QuotaExceededError, match="full"):
        await service.list_runs()
    assert len(seen) == 1


async def test_errors_arrive_as_they_were() -> None:
    service, seen = scripted(httpx.Response(404, json=NOT_FOUND))
    with pytest.raises(RunNotFoundError, match=r"no run\."):
        await service.get_run("x")
    assert len(seen) == 1


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"a": 1}),
        httpx.Response(404, text="nginx"),
        httpx.Response(404, json=[]),
        httpx.Response(404, json={"error": "x"}),
        httpx.Response(302, headers={"Location": "/"}),
    ],
)
async def test_what_is_no_weaver_server_is_named(reply: httpx.Response) -> None:
    service, _ = scripted(reply)
    with pytest.raises(ServiceConnectionError, match=f"{ADDRESS} answered"):
        await service.list_runs()
    with pytest.raises(ServiceConnectionError, match=f"{ADDRESS} answered"):
        await service.collect("s", after=0, timeout_s=0)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://[::", "no address"),
        ("http://", "names no host"),
        ("http://127.0.0.1:99999", "no address.*0-65535"),
        ("ftp://127.0.0.1", "http://"),
        ("http://127.0.0.1:8000?x=1", "more than a path"),
        ("http://127.0.0.1:8000/v1/", "/v1 at its end"),
    ],
)
def test_what_is_no_address_is_named(address: str, why: str) -> None:
    with pytest.raises(ServiceConnectionError, match=why):
        HttpService(address)


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ServiceConnectionError, match="keys are sent apart") as refused:
        HttpService("http://me:secret@weaver.example:8000")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
async def test_a_server_on_this_machine_is_reached_past_a_proxy(
    home: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with over_socket(FakeEngine(), home) as service:
        assert await service.list_runs() == []


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:9")
    with pytest.raises(ServiceConnectionError, match="proxy"):
        HttpService("http://weaver.example:8000")


async def test_ids_cannot_leave_their_place_in_a_path() -> None:
    service, seen = scripted(httpx.Response(404, json=NOT_FOUND))
    with pytest.raises(RunNotFoundError):
        await service.get_run("../sessions?x=1#/é")
    assert seen[0].url.raw_path == b"/v1/runs/..%2Fsessions%3Fx%3D1%23%2F%C3%A9"


async def test_metadata_that_json_cannot_hold_is_refused_here() -> None:
    service, seen = scripted(httpx.Response(201))
    with pytest.raises(InvalidRequestError, match="user_metadata"):
        await service.open_session(user_metadata={"x": object()})
    assert not seen


class Faults(httpx.AsyncBaseTransport):
    """A bad network: requests and replies get lost, come late, or come twice."""

    def __init__(self, inner: httpx.AsyncBaseTransport, seed: int) -> None:
        self._inner = inner
        self._random = random.Random(seed)
        self.count = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        fault = self._random.choice(
            ["none", "none", "request", "reply", "twice", "late", "overtaken"]
        )
        self.count += fault != "none"
        if fault == "request":
            raise httpx.ConnectError("the request was lost")
        if fault == "late":
            await anyio.sleep(self._random.uniform(0, 0.01))
        reply = await self._inner.handle_async_request(request)
        if fault == "twice":
            await reply.aclose()
            reply = await self._inner.handle_async_request(request)
        if fault == "overtaken":  # the reply comes after those of requests sent later
            await reply.aread()
            await anyio.sleep(self._random.uniform(0, 0.01))
        if fault == "reply":
            await reply.aread()
            raise httpx.ReadError("the reply was lost")
        return reply


async def train_through_faults(home: Path, *, seed: int, steps: int) -> int:
    """Trains on a bad network beside a good one; answers how many faults there were."""
    engine = FakeEngine()
    calls: list[str] = []
    engine.hook = lambda name, _: calls.append(name)
    async with running(home, engine=engine) as server:
        faults = Faults(server.transport(), seed)
        async with HttpService(ADDRESS, transport=faults) as bad, server.client() as good:
            losses = []
            for service in (bad, good):
                calls.clear()
                caller = await Caller.open(service)
                run = await caller.create()
                ids = []
                async with anyio.create_task_group() as tasks:
                    for _ in range(steps):
                        batch = [caller.stamp(GRADIENT, run), caller.stamp(STEP, run)]
                        ids += [submission.id for submission in batch]
                        tasks.start_soon(service.submit, caller.session_id, batch)
                results = [await caller.result(id) for id in ids]
                assert calls.count("gradient") == calls.count("optim_step") == steps
                losses.append([r.output.metrics["loss"] for r in results[::2]])
                await service.log_metrics(run, [MetricPoint(name="a", value=1)])
                assert len(await service.read_metrics(run)) == 1
            assert losses[0] == losses[1]
    return faults.count


async def test_a_bad_network_changes_nothing(home: Path) -> None:
    assert await train_through_faults(home, seed=1, steps=30) > 20


@pytest.mark.slow
async def test_a_thousand_faults_change_nothing(home: Path, anyio_backend: str) -> None:
    if anyio_backend == "trio":
        pytest.skip("the short form runs on both")
    count = 0
    for seed in range(1000):
        count += await train_through_faults(home / str(seed), seed=seed, steps=60)
        if count >= 1000:
            return


class Cut(httpx.AsyncBaseTransport):
    """Ends each stream after a few bytes."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self.cuts = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        reply = await self._inner.handle_async_request(request)
        if "/stream/" not in request.url.path:
            return reply
        body = await reply.aread()
        keep = 400 if len(body) > 400 else len(body)
        self.cuts += keep < len(body)
        return httpx.Response(reply.status_code, content=body[:keep])


async def test_a_stream_that_breaks_goes_on_where_it_was(home: Path) -> None:
    async with running(home) as server:
        cut = Cut(server.transport())
        async with HttpService(ADDRESS, transport=cut) as service:
            caller = await Caller.open(service)
            params = SamplingParams(max_tokens=30, seed=1)
            sample = Sample(sampler_id="base:fake", prompt="x", params=params, stream=True)
            submission_id = await caller.start(sample)
            pieces = [p async for p in service.stream(caller.session_id, submission_id)]
            result = await caller.result(submission_id)
        assert cut.cuts > 3
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        assert tokens == result.output.sequences[0].tokens


async def test_a_stopping_server_ends_polls_at_once_and_says_come_back(home: Path) -> None:
    async with running(home) as server, server.client() as service:
        caller = await Caller.open(service)
        async with anyio.create_task_group() as tasks:

            async def stop() -> None:
                await anyio.sleep(0.05)
                server.gateway.stop()

            tasks.start_soon(stop)
            service._outage_s = 0.2
            with anyio.fail_after(3), pytest.raises(ServiceConnectionError, match="stopping"):
                await service.collect(caller.session_id, after=0, timeout_s=25)
        async with server.http() as client:
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200


async def test_a_slow_reader_stops_nobody(home: Path) -> None:
    with serving(FakeEngine(), ServerSettings(home=home, port=0, auth=False)) as server:
        async with HttpService(server.address) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            long = Sample(
                sampler_id="base:fake",
                prompt="x",
                params=SamplingParams(max_tokens=200),
                num_samples=50,
                stream=True,
            )
            submission_id = await caller.start(long)
            stream = service.stream(caller.session_id, submission_id)
            await anext(stream)
            with anyio.fail_after(20):
                await caller.do(GRADIENT, GradientsDone, run_id=run)
                await caller.do(STEP, StepDone, run_id=run)
            pieces = 1 + len([p async for p in stream])
            assert pieces >= 50


def test_every_changing_route_answers_a_resend(home: Path) -> None:
    """A second request with the same key gets the first answer, byte for byte."""

    async def check() -> None:
        async with running(home) as server, server.http() as client:
            headers = {"Idempotency-Key": "k"}
            replies: list[str] = []
            for _ in range(2):
                reply = await client.post("/v1/sessions", json={}, headers=headers)
                replies.append(reply.text)
            assert replies[0] == replies[1]
            other = await client.post("/v1/sessions", json={}, headers={"Idempotency-Key": "l"})
            assert other.text != replies[0]

    anyio.run(check)


async def test_an_operation_above_the_limit_of_the_server_fails_alone(home: Path) -> None:
    limits = Limits(body_bytes=200_000)
    settings = ServerSettings(home=home, port=0, auth=False, limits=limits)
    with serving(FakeEngine(context_length=2**20), settings) as server:
        async with AsyncServiceClient(server.address) as client:
            trainer = await client.create_model("fake", {"rank": 4})
            handles = []
            for tokens in (9_000, 15_000, 2**18, 15_000, 10):
                ones = np.ones(tokens, np.int64)
                datum = Datum(model_input=ones, loss_fn_inputs={"target_tokens": ones})
                handles.append(trainer.forward_backward([datum], loss_fn="cross_entropy"))
            with pytest.raises(TooLargeError, match="the limit is"):
                await handles.pop(2)
            for handle in handles:
                await handle
            with pytest.raises(GradientsDiscardedError, match="seq 3"):
                await trainer.optim_step({"learning_rate": 0.1})


async def test_outcomes_come_in_moderate_messages(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PORTION", 7)
    async with running(home) as server, server.client() as service:
        caller = await Caller.open(service)
        run = await caller.create()
        ids = await caller.send(*(caller.stamp(FORWARD, run) for _ in range(20)))
        for submission_id in ids:
            await caller.result(submission_id)
        assert caller.cursor == 21
