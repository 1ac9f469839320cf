"""Log lines as JSON: which operations a request brought, and what became of each."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import BAD_GRADIENT, GRADIENT, Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import running
from tests.server.test_service import Recorder
from weaver import wire
from weaver.protocol import MEDIA_TYPE, Sample
from weaver.server.http.telemetry import TEXT, JsonFormatter, TextFormatter, _add_request_id
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import Message

pytestmark = pytest.mark.anyio
HOST = [(b"host", b"localhost")]


async def test_lines_name_requests_and_operations(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.setFormatter(JsonFormatter())
    caplog.handler.addFilter(_add_request_id)
    async with running(home, auth=True) as server:
        key = server.keys.create("mine")[1]
        async with server.client(key) as service, server.http(key) as http:
            caller = await Caller.open(service)
            run = await caller.create()
            sent = [caller.stamp(operation, run) for operation in (GRADIENT, BAD_GRADIENT)]
            headers = {"Content-Type": MEDIA_TYPE, "X-Request-ID": "req-1"}
            path = f"/v1/sessions/{caller.session_id}/submissions"
            await http.post(path, content=wire.encode(sent), headers=headers)
            for submission in sent:
                await caller.outcome(submission.id)
            for path_polled in ("/v1/runs", f"/v1/runs/{run}/curves", "/v1/runs/nobody"):
                await http.get(path_polled)
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    ids = [submission.id for submission in sent]
    [request] = [line for line in lines if line["request_id"] == "req-1" and "path" in line]
    assert (request["path"], request["status"], request["operation_ids"]) == (path, 202, ids)
    assert request["project"] == "mine"
    ended = {line["operation_id"]: line for line in lines if "operation_id" in line}
    assert [ended[id]["outcome"] for id in ids] == ["done", "token_out_of_range"]
    assert [(ended[id]["run_id"], ended[id]["seq"]) for id in ids] == [(run, 1), (run, 2)]
    assert key not in caplog.text
    read = [line["path"] for line in lines if line.get("method") == "GET"]
    assert read == ["/v1/runs/nobody"]  # polls are quiet, refusals are not


async def test_a_request_writes_no_line_of_its_own(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.setFormatter(TextFormatter(TEXT))
    caplog.handler.addFilter(_add_request_id)
    async with running(home) as server, server.http() as http:
        await http.get("/v1/runs/a%0aINFO%20forged%1b%5B31m%E2%80%A8%C2%9B")
    lines = [line for line in caplog.text.splitlines() if " weaver.server.http " in line]
    [line] = [line for line in lines if "forged" in line]
    assert line.endswith(r"GET /v1/runs/a\nINFO forged\x1b[31m\u2028\x9b 404")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/runs/x", "/v1/runs/{run_id}"),
        ("/api/v1/models/x", "/api/v1/models/{model_id}"),
        ("/api/v1/operations/x", "/api/v1/operations/{operation_id}"),
        ("/nowhere", "none"),
    ],
)
async def test_metrics_name_whole_routes(home: Path, path: str, route: str) -> None:
    async with running(home) as server, server.http() as http:
        assert (await http.get(path)).status_code == 404
        assert f'route="{route}",status="404"' in (await http.get("/metrics")).text


async def test_a_reader_that_leaves_before_the_first_token_is_no_error_of_the_server(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    record = Recorder()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async with running(home, engine=FakeEngine(hook=record)) as server:
        record.hold = "step"
        async with server.client() as service:
            caller = await Caller.open(service)
            params = SamplingParams(max_tokens=4)
            prompt = ModelInput.from_ints([1])
            sample = Sample(sampler_id="base:fake", prompt=prompt, params=params, stream=True)
            taken = await caller.start(sample)
            await record.until_held()
            path = f"/v1/sessions/{caller.session_id}/stream/{taken}"
            scope = {"type": "http", "method": "GET", "path": path, "headers": HOST}
            await server.app(scope | {"query_string": b""}, receive, send)
            record.go_on.set()
    assert sent == []
    [line] = [one for one in caplog.messages if "/stream/" in one]
    assert line.endswith(" 499")
