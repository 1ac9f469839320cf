"""Bad HTTP requests: each answered at once with the right status, a code, and what to do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import zstandard
from pydantic import TypeAdapter

from tests.server.http.helpers import running
from weaver import wire
from weaver.protocol import MEDIA_TYPE, CreateModel, ModelCreated, Outcome, Sample, Submission
from weaver.server.settings import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio
OUTCOMES = TypeAdapter(tuple[Outcome, ...])
LIMITS = Limits(body_bytes=100_000, submissions=8)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def http(home: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with running(home, limits=LIMITS) as server, server.http() as client:
        reply = await client.post("/v1/sessions", json={})
        client.params = httpx.QueryParams()
        client.headers["X-Session"] = reply.json()["session_id"]
        yield client


def message(tree: object, *, raw: bytes = b"") -> bytes:
    header = json.dumps(tree).encode()
    frame = zstandard.compress(raw) if raw else b""
    lengths = len(header).to_bytes(4, "little") + len(raw).to_bytes(8, "little")
    return wire.MAGIC + lengths + header + frame


def operation(**fields: Any) -> bytes:
    return message([{"id": "a", "operation": fields}])


def announced(*, header: int = 2, arrays: int = 0) -> bytes:
    lengths = header.to_bytes(4, "little") + arrays.to_bytes(8, "little")
    return wire.MAGIC + lengths + b"[]"


def gradient(**datum: Any) -> bytes:
    return operation(kind="forward_backward", loss_fn="cross_entropy", datums=[datum])


TOKENS = {"chunks": [{"tokens": [1, 2]}]}
SAMPLE = {"kind": "sample", "sampler_id": "base:fake", "prompt": "x"}
BOMB = wire.MAGIC + bytes([2, 0, 0, 0]) + (9000).to_bytes(8, "little") + b"[]"
BOMB += zstandard.compress(bytes(2**24))

SUBMISSIONS: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid_request"),
    (b"{}", 400, "invalid_request"),
    (b'{"id": "a", "operation": null}', 400, "invalid_request"),
    (wire.MAGIC, 400, "invalid_request"),
    (b"WVR\x02" + bytes(12), 400, "invalid_request"),
    (announced(header=500), 400, "invalid_request"),
    (announced(header=10**6), 413, "too_large"),
    (announced(arrays=10**12), 413, "too_large"),
    (announced(arrays=100), 400, "invalid_request"),
    (bytes(300_000), 413, "too_large"),
    (BOMB, 400, "invalid_request"),
    (message([], raw=b"abc"), 400, "invalid_request"),
    (message({"$tensor": ["f4", [2], 0]}, raw=b"abcd"), 400, "invalid_request"),
    (message({"$list": ["i4", [1], 8]}, raw=b"abcd"), 400, "invalid_request"),
    (message({"$pickle": "x"}), 400, "invalid_request"),
    (message({}), 400, "invalid_request"),
    (message("a"), 400, "invalid_request"),
    (message([1]), 400, "invalid_request"),
    (message([None]), 400, "invalid_request"),
    (message([{}]), 422, "invalid_params"),
    (message([{"id": 1, "operation": None}]), 422, "invalid_params"),
    (message([{"id": "a", "operation": None, "seq": 0}]), 422, "invalid_params"),
    (message([{"id": "a", "operation": None, "seq": "x"}]), 422, "invalid_params"),
    (message([{"id": "a", "operation": None, "extra": 1}]), 422, "invalid_params"),
    (message([{"id": "a", "operation": None}] * 9), 413, "too_large"),
    (message([{"id": "a", "operation": None, "seq": 2**63}]), 422, "invalid_params"),
    (message([{"id": "a\0", "operation": None}]), 422, "invalid_params"),
    (message([{"id": "a" * 300, "operation": None}]), 422, "invalid_params"),
    (message([{"id": "a", "operation": None, "run_id": "\0"}]), 422, "invalid_params"),
    (operation(kind="create_model", base_model="m", seed=2**70), 422, "invalid_params"),
    (operation(kind="save_checkpoint", purpose="state", ttl_seconds=2**62), 422, "invalid_params"),
    (operation(kind="format_disk"), 422, "invalid_params"),
    (operation(), 422, "invalid_params"),
    (operation(kind="create_model"), 422, "invalid_params"),
    (operation(kind="create_model", base_model=3), 422, "invalid_params"),
    (operation(kind="create_model", base_model="m", seed="x"), 422, "invalid_params"),
    (operation(kind="create_model", base_model="m", training_mode="all"), 422, "invalid_params"),
    (
        operation(kind="create_model", base_model="m", lora_config={"rank": 0}),
        422,
        "invalid_params",
    ),
    (
        operation(kind="create_model", base_model="m", lora_config={"rnk": 1}),
        422,
        "invalid_params",
    ),
    (operation(kind="optim_step", params={"learning_rate": -1}), 422, "invalid_params"),
    (operation(kind="optim_step", params={"beta1": 1}), 422, "invalid_params"),
    (operation(kind="optim_step", params={"lr": 1}), 422, "invalid_params"),
    (operation(kind="save_checkpoint", purpose="backup"), 422, "invalid_params"),
    (operation(kind="save_checkpoint", purpose="state", ttl_seconds=0), 422, "invalid_params"),
    (gradient(), 422, "invalid_datum"),
    (gradient(model_input={"chunks": [{"tokens": [-1]}]}), 422, "invalid_datum"),
    (gradient(model_input={"chunks": [{"tokens": ["a"]}]}), 422, "invalid_datum"),
    (gradient(model_input={"chunks": [{"tokens": [[1]]}]}), 422, "invalid_datum"),
    (gradient(model_input={"chunks": [{"type": "image", "tokens": []}]}), 422, "invalid_datum"),
    (gradient(model_input=TOKENS, loss_fn_inputs=[]), 422, "invalid_datum"),
    (gradient(model_input=TOKENS, loss_fn_inputs={"target_tokens": "x"}), 422, "invalid_datum"),
    (gradient(model_input=TOKENS, loss_fn_inputs={"target_tokens": [1.5]}), 422, "invalid_datum"),
    (operation(**SAMPLE, params={"max_tokens": 0}), 422, "invalid_params"),
    (operation(**SAMPLE, params={"temperature": -1}), 422, "invalid_params"),
    (operation(**SAMPLE, params={"top_p": 0}), 422, "invalid_params"),
    (operation(**SAMPLE, params={"stop": [""]}), 422, "invalid_params"),
    (operation(**SAMPLE, num_samples=-1), 422, "invalid_params"),
    (operation(**SAMPLE, num_samples=10**6), 422, "invalid_params"),
    (operation(**{**SAMPLE, "prompt": 3}), 422, "invalid_params"),
]

REQUESTS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/nowhere", {}, 404, "not_found"),
    ("GET", "/v1", {}, 404, "not_found"),
    ("GET", "/v2/models", {}, 404, "not_found"),
    ("PUT", "/v1/sessions", {}, 405, "invalid_request"),
    ("POST", "/v1/runs/run-0/stop", {}, 404, "run_not_found"),
    ("DELETE", "/v1/runs/run-0", {}, 404, "run_not_found"),
    ("DELETE", "/v1/runs/run-0?checkpoints=perhaps", {}, 422, "invalid_request"),
    ("PATCH", "/v1/sessions", {}, 405, "invalid_request"),
    ("DELETE", "/v1/base-models", {}, 405, "invalid_request"),
    ("POST", "/v1/sessions", {}, 422, "invalid_request"),
    ("POST", "/v1/sessions", {"content": b"{}"}, 415, "invalid_request"),
    ("POST", "/v1/sessions", {"data": {"user_metadata": "{}"}}, 415, "invalid_request"),
    ("PUT", "/v1/checkpoints/ttl?path=x", {"content": b"{}"}, 415, "invalid_request"),
    ("POST", "/v1/sessions", {"content": b"{", "headers": "json"}, 400, "invalid_request"),
    (
        "POST",
        "/v1/sessions",
        {"content": b"[" * 60_000, "headers": "json"},
        400,
        "invalid_request",
    ),
    ("POST", "/v1/sessions", {"content": b'"\xff"', "headers": "json"}, 400, "invalid_request"),
    ("POST", "/v1/sessions", {"json": []}, 422, "invalid_request"),
    ("POST", "/v1/sessions", {"json": {"user_metadata": 1}}, 422, "invalid_params"),
    ("POST", "/v1/sessions", {"json": {"admin": True}}, 422, "invalid_params"),
    ("POST", "/v1/sessions", {"content": bytes(5 * 2**20)}, 413, "too_large"),
    ("GET", "/v1/sessions/none/outcomes", {}, 404, "not_found"),
    ("GET", "/v1/sessions/%00/outcomes", {}, 404, "not_found"),
    ("GET", "/v1/sessions/..%2F..%2Fetc/outcomes", {}, 404, "not_found"),
    ("GET", "/v1/sessions/S/outcomes?after=-1", {}, 422, "invalid_params"),
    ("GET", "/v1/sessions/S/outcomes?after=x", {}, 422, "invalid_params"),
    ("GET", "/v1/sessions/S/outcomes?after=99999999999999999999", {}, 422, "invalid_params"),
    ("GET", "/v1/sessions/S/outcomes?timeout=26", {}, 422, "invalid_params"),
    ("GET", "/v1/sessions/S/outcomes?timeout=nan", {}, 422, "invalid_params"),
    ("POST", "/v1/sessions/S/submissions", {"json": []}, 415, "invalid_request"),
    ("POST", "/v1/sessions/S/submissions", {"content": b"x"}, 415, "invalid_request"),
    ("POST", "/v1/sessions/none/cancel", {"json": {"submission_ids": []}}, 404, "not_found"),
    ("POST", "/v1/sessions/S/cancel", {"json": {}}, 422, "invalid_params"),
    ("POST", "/v1/sessions/S/cancel", {"json": {"submission_ids": "a"}}, 422, "invalid_params"),
    (
        "POST",
        "/v1/sessions/S/cancel",
        {"json": {"submission_ids": ["a"] * 10_001}},
        422,
        "invalid_params",
    ),
    ("GET", "/v1/sessions/none/stream/a", {}, 404, "not_found"),
    ("GET", "/v1/sessions/S/stream/none", {}, 404, "not_found"),
    ("GET", "/v1/sessions/S/stream/a", {"headers": {"Last-Event-ID": "x"}}, 422, "invalid_request"),
    ("GET", "/v1/base-models/info", {}, 422, "invalid_request"),
    ("GET", "/v1/base-models/info?name=", {}, 422, "invalid_request"),
    ("GET", "/v1/base-models/info?name=none", {}, 404, "unknown_model"),
    ("GET", "/v1/base-models/info?name=/etc/passwd", {}, 404, "unknown_model"),
    ("GET", f"/v1/base-models/info?name={'x' * 2000}", {}, 422, "invalid_request"),
    ("GET", "/v1/base-models/tokenizer?name=../..", {}, 404, "unknown_model"),
    ("GET", "/v1/runs/none", {}, 404, "run_not_found"),
    ("GET", "/v1/runs/none/metrics", {}, 404, "run_not_found"),
    ("POST", "/v1/runs/none/metrics", {"json": {"points": []}}, 404, "run_not_found"),
    ("POST", "/v1/runs/none/metrics", {"json": {}}, 422, "invalid_params"),
    (
        "POST",
        "/v1/runs/none/metrics",
        {"json": {"points": [{"name": "a"}]}},
        422,
        "invalid_params",
    ),
    (
        "POST",
        "/v1/runs/none/metrics",
        {"content": b'{"points":[{"name":"a","value":NaN}]}', "headers": "json"},
        422,
        "invalid_params",
    ),
    ("GET", "/v1/checkpoints/info", {}, 422, "invalid_request"),
    ("GET", "/v1/checkpoints/info?path=/etc/passwd", {}, 404, "checkpoint_not_found"),
    ("GET", "/v1/checkpoints/info?path=weaver://r/weights/x", {}, 404, "checkpoint_not_found"),
    ("GET", "/v1/checkpoints/info?path=weaver://../weights/x", {}, 422, "invalid_name"),
    ("GET", "/v1/checkpoints/info?path=weaver://r/weights/%2e%2e", {}, 422, "invalid_name"),
    ("GET", "/v1/checkpoints/export?path=weaver://r/weights/x", {}, 404, "checkpoint_not_found"),
    ("GET", "/v1/checkpoints/export?path=/etc&merge=1", {}, 404, "checkpoint_not_found"),
    ("GET", "/v1/checkpoints/export/file?path=weaver://r/weights/x", {}, 422, "invalid_request"),
    (
        "GET",
        "/v1/checkpoints/export/file?path=weaver://r/weights/x&name=../lock",
        {},
        404,
        "checkpoint_not_found",
    ),
    (
        "GET",
        "/v1/checkpoints/export/file?path=weaver://r/weights/x&name=y&offset=-1",
        {},
        422,
        "invalid_request",
    ),
    ("DELETE", "/v1/checkpoints", {}, 422, "invalid_request"),
    ("DELETE", "/v1/checkpoints?path=weaver://r/weights/x", {}, 404, "checkpoint_not_found"),
    ("DELETE", "/v1/checkpoints?path=weaver://r", {}, 422, "invalid_name"),
    ("PUT", "/v1/checkpoints/ttl?path=weaver://r/weights/x", {"json": {}}, 422, "invalid_params"),
    (
        "PUT",
        "/v1/checkpoints/ttl?path=weaver://r/weights/x",
        {"json": {"ttl_seconds": 0}},
        422,
        "invalid_params",
    ),
    (
        "PUT",
        "/v1/checkpoints/ttl?path=weaver://r/weights/x",
        {"json": {"ttl_seconds": None}},
        404,
        "checkpoint_not_found",
    ),
    (
        "POST",
        "/v1/runs/run-0/metrics",
        {"json": {"points": [{"name": "x", "value": 1, "step": 2**70}]}},
        422,
        "invalid_params",
    ),
    (
        "POST",
        "/v1/runs/run-0/metrics",
        {"json": {"points": [{"name": "x\0", "value": 1}]}},
        422,
        "invalid_params",
    ),
    ("GET", "/healthz", {"headers": {"Host": "evil.example"}}, 200, ""),
    ("GET", "/v1/runs", {"headers": {"Host": "evil.example"}}, 403, "permission_denied"),
    ("GET", "/v1/runs", {"headers": {"Origin": "http://evil.example"}}, 403, "permission_denied"),
    ("GET", "/v1/runs", {"headers": {"Origin": "null"}}, 403, "permission_denied"),
]


def check(reply: httpx.Response, status: int, code: str) -> None:
    assert reply.status_code == status, reply.text
    assert reply.headers["X-Request-ID"]
    if status < 400:
        return
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["request_id"] == reply.headers["X-Request-ID"]
    assert error["message"] and "Traceback" not in reply.text


def test_there_are_enough_of_them() -> None:
    assert len(SUBMISSIONS) + len(REQUESTS) >= 120


async def test_numbers_beyond_64_bits_harm_nobody(http: httpx.AsyncClient) -> None:
    """Where JSON may hold them: tokens are refused by name, metadata is the user's own."""
    path = f"/v1/sessions/{http.headers['X-Session']}"
    prompt = {"chunks": [{"tokens": [2**70]}]}
    made = {"kind": "create_model", "base_model": "fake", "user_metadata": {"a": [2**70]}}
    both = [
        {"id": "a", "operation": {**SAMPLE, "prompt": prompt}},
        {"id": "b", "operation": made},
    ]
    headers = {"Content-Type": MEDIA_TYPE}
    sent = await http.post(f"{path}/submissions", content=message(both), headers=headers)
    assert sent.status_code == 202, sent.text
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < 2:
        reply = await http.get(f"{path}/outcomes?timeout=5&after={len(outcomes)}")
        outcomes |= {one.submission_id: one for one in wire.decode(reply.content, OUTCOMES)}
    error = outcomes["a"].error
    assert error is not None and error.code == "token_out_of_range"
    assert isinstance(outcomes["b"].result, ModelCreated)


@pytest.mark.parametrize(("body", "status", "code"), SUBMISSIONS)
async def test_bad_submissions(
    http: httpx.AsyncClient, body: bytes, status: int, code: str
) -> None:
    path = f"/v1/sessions/{http.headers['X-Session']}/submissions"
    check(await http.post(path, content=body, headers={"Content-Type": MEDIA_TYPE}), status, code)
    good = wire.encode([Submission(id="a", operation=CreateModel(base_model="fake"))])
    reply = await http.post(path, content=good, headers={"Content-Type": MEDIA_TYPE})
    assert reply.status_code == 202


async def test_bad_requests(http: httpx.AsyncClient) -> None:
    wrong = []
    for method, path, options, status, code in REQUESTS:
        session = http.headers["X-Session"]
        if options.get("headers") == "json":
            options = {**options, "headers": {"Content-Type": "application/json"}}
        reply = await http.request(method, path.replace("/S/", f"/{session}/"), **options)
        try:
            check(reply, status, code)
        except AssertionError as error:
            wrong.append(f"{method} {path[:80]}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


async def test_the_same_id_with_another_body_is_a_conflict(http: httpx.AsyncClient) -> None:
    path = f"/v1/sessions/{http.headers['X-Session']}/submissions"
    for prompt, status in (("a", 202), ("a", 202), ("b", 409)):
        sample = Sample(sampler_id="base:fake", prompt=prompt)
        body = wire.encode([Submission(id="x", operation=sample)])
        reply = await http.post(path, content=body, headers={"Content-Type": MEDIA_TYPE})
        assert reply.status_code == status
    check(reply, 409, "conflict")
