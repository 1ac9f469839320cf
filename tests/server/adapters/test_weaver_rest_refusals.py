"""Requests of the Weaver REST interface that cannot be carried out, each with its envelope."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.adapters.helpers import CHUNKS, TARGETS, multipart, packed, passes, rest
from tests.server.http.helpers import running
from weaver.errors import InvalidRequestError, TooLargeError
from weaver.server.adapters.weaver_rest.bodies import BackwardBody
from weaver.server.adapters.weaver_rest.tensors import Body, parse

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

UUID = str(uuid.uuid4())
BACKWARD = "/models/{model}/forward-backward-passes"
SAMPLES = "/sampling-sessions/{sampling}/samples"
PASS = passes("forward_backward")
POINT = {"model_id": "{model}", "name": "x", "value": 1.0}


def data(**inputs: object) -> dict[str, Any]:
    given = {"target_tokens": TARGETS, **inputs}
    return passes("forward_backward", data=[{"model_input": CHUNKS, "loss_fn_inputs": given}])


def sample(**changes: object) -> dict[str, Any]:
    return {"prompt": CHUNKS, **changes}


REFUSED: list[tuple[str, str, object, int, str]] = [
    # sessions and models
    ("POST", "/sessions", [], 400, "invalid_request"),
    ("POST", "/sessions", {"scheduling_policy": {"mode": "fifo"}}, 422, "unsupported"),
    ("GET", "/sessions/nobody", None, 422, "invalid_request"),
    ("POST", "/sessions/nobody/heartbeat", None, 422, "invalid_request"),
    ("POST", "/sessions/nobody/models", {"base_model": "fake"}, 422, "invalid_request"),
    ("POST", f"/sessions/{UUID}/models", {}, 400, "invalid_request"),
    ("POST", f"/sessions/{UUID}/models", {"base_model": "gpt-9"}, 404, "unknown_model"),
    ("POST", f"/sessions/{UUID}/models", {"base_model": "../x"}, 404, "unknown_model"),
    (
        "POST",
        f"/sessions/{UUID}/models",
        {"base_model": "fake", "training_mode": "dpo"},
        400,
        "invalid_request",
    ),
    (
        "POST",
        f"/sessions/{UUID}/models",
        {"base_model": "fake", "lora_config": {"rank": 0}},
        422,
        "invalid_params",
    ),
    ("GET", "/models?limit=0", None, 422, "invalid_request"),
    ("GET", "/models?offset=-1", None, 422, "invalid_request"),
    ("GET", "/training-runs?limit=x", None, 422, "invalid_request"),
    ("GET", "/models/nobody", None, 404, "run_not_found"),
    ("GET", "/training-runs/nobody", None, 404, "run_not_found"),
    ("POST", "/models/nobody/terminate", None, 404, "run_not_found"),
    ("POST", f"/sessions/{UUID}/metrics", {"metrics": [{}]}, 400, "invalid_request"),
    (
        "POST",
        f"/sessions/{UUID}/metrics",
        {"metrics": [{**POINT, "model_id": "nobody"}]},
        404,
        "run_not_found",
    ),
    # training
    ("POST", "/models/nobody/forward-backward-passes", PASS, 404, "run_not_found"),
    ("POST", "/models/nobody/optimizer-steps", {}, 404, "run_not_found"),
    ("POST", "/models/nobody/checkpoints", {}, 404, "run_not_found"),
    ("POST", "/models/nobody/export-sampler", {}, 404, "run_not_found"),
    ("POST", "/models/nobody/export-hf", {}, 404, "run_not_found"),
    ("POST", BACKWARD, {}, 400, "invalid_request"),
    ("POST", BACKWARD, {"payload": 3}, 400, "invalid_request"),
    ("POST", BACKWARD, passes("forward"), 400, "invalid_request"),
    ("POST", BACKWARD, passes("forward_backward", data="x"), 400, "invalid_request"),
    ("POST", BACKWARD, data(weights="x"), 422, "invalid_datum"),
    ("POST", BACKWARD, data(weights={"dtype": "float32"}), 422, "invalid_datum"),
    ("POST", BACKWARD, data(target_tokens=[0.5, 1.5, 2.5]), 422, "invalid_datum"),
    ("POST", BACKWARD, data(target_tokens=[[1], [2, 3]]), 422, "invalid_datum"),
    (
        "POST",
        BACKWARD,
        passes("forward_backward", data=[{"model_input": {"chunks": [{"type": "image"}]}}]),
        422,
        "invalid_datum",
    ),
    (
        "POST",
        BACKWARD,
        passes("forward_backward", data=[{"model_input": {"chunks": [{"tokens": [-1]}]}}]),
        422,
        "invalid_datum",
    ),
    (
        "POST",
        BACKWARD,
        passes("forward_backward", data=[{"kind": "sample_ref", "dataset": "d"}]),
        422,
        "unsupported",
    ),
    ("POST", "/models/{model}/optimizer-steps", {"payload": {}}, 400, "invalid_request"),
    (
        "POST",
        "/models/{model}/optimizer-steps",
        {"payload": {"adam_params": {"learning_rate": -1}}},
        422,
        "invalid_params",
    ),
    ("POST", "/models/{model}/checkpoints", {"type": "all"}, 400, "invalid_request"),
    ("POST", "/models/{model}/checkpoints", {"ttl_seconds": 0}, 400, "invalid_request"),
    ("POST", "/models/{model}/load", {}, 400, "invalid_request"),
    ("POST", "/models/{model}/load", {"path": UUID}, 404, "checkpoint_not_found"),
    ("POST", "/models/{model}/load", {"path": "/etc"}, 404, "checkpoint_not_found"),
    ("POST", "/models/{model}/load", {"path": "file:///etc"}, 404, "checkpoint_not_found"),
    (
        "PATCH",
        "/models/{model}/checkpoints/ttl",
        {"path": "weaver://{model}/checkpoints/x", "ttl_seconds": 1},
        404,
        "checkpoint_not_found",
    ),
    # sampling
    (
        "POST",
        f"/sessions/{UUID}/sampling-sessions",
        {"base_model": None, "model_path": None},
        400,
        "invalid_request",
    ),
    (
        "POST",
        f"/sessions/{UUID}/sampling-sessions",
        {"base_model": "gpt-9"},
        404,
        "unknown_model",
    ),
    (
        "POST",
        f"/sessions/{UUID}/sampling-sessions",
        {"model_path": "weaver://{model}/sampler/x"},
        404,
        "checkpoint_not_found",
    ),
    ("GET", "/sampling-sessions/%21", None, 404, "not_found"),
    ("GET", "/sampling-sessions/AAAA", None, 404, "checkpoint_not_found"),
    ("DELETE", "/sampling-sessions/x", None, 404, "not_found"),
    ("POST", SAMPLES, {}, 400, "invalid_request"),
    ("POST", SAMPLES, sample(num_samples=0), 400, "invalid_request"),
    ("POST", SAMPLES, sample(num_samples=10**6), 400, "invalid_request"),
    ("POST", SAMPLES, sample(sampling_params={"top_p": 2}), 422, "invalid_params"),
    ("POST", SAMPLES, sample(sampling_params={"stop": [""]}), 422, "invalid_params"),
    ("POST", SAMPLES, sample(sampling_params={"stop_token_ids": "x"}), 422, "invalid_datum"),
    ("POST", SAMPLES, sample(topk_prompt_logprobs=257), 400, "invalid_request"),
    ("POST", SAMPLES, sample(score_centering={"head_size": 1}), 422, "unsupported"),
    ("POST", SAMPLES, sample(return_sampling_mask=True), 422, "unsupported"),
    ("POST", SAMPLES, sample(return_moe_topk_indices=True), 422, "unsupported"),
    (
        "POST",
        "/sampling-sessions/{sampling}/logprobs",
        sample(loss_fn_config={"temperature": 0.5}),
        422,
        "unsupported",
    ),
    (
        "POST",
        "/sampling-sessions/{sampling}/pause-generation",
        {"mode": "hard"},
        400,
        "invalid_request",
    ),
    # operations and artifacts
    ("GET", "/operations/nobody", None, 404, "not_found"),
    ("POST", f"/checkpoints/{UUID}/export", {}, 404, "checkpoint_not_found"),
    ("GET", f"/checkpoints/{UUID}/artifacts", None, 404, "checkpoint_not_found"),
    ("GET", f"/artifacts/{UUID}/download", None, 404, "checkpoint_not_found"),
    ("GET", "/downloads/x.y/file", None, 403, "permission_denied"),
    ("POST", "/models/{model}/export-hf", {"format": "gguf"}, 400, "invalid_request"),
    # what has no meaning here
    ("GET", "/organizations", None, 422, "unsupported"),
    ("GET", "/organizations/x/projects", None, 422, "unsupported"),
    ("GET", "/scope/resolve?organization=x", None, 422, "unsupported"),
    ("GET", "/quota/balance", None, 422, "unsupported"),
    ("POST", "/quota/requests", {}, 422, "unsupported"),
    ("GET", "/scheduling/options", None, 422, "unsupported"),
    ("GET", "/managed-datasets", None, 422, "unsupported"),
    ("GET", "/managed-datasets/x/versions/1", None, 422, "unsupported"),
    ("POST", "/models/{model}/managed-dataset-sample-lengths", {}, 422, "unsupported"),
    ("POST", f"/checkpoints/{UUID}/deployments", {}, 422, "unsupported"),
    ("GET", "/deployments", None, 422, "unsupported"),
    ("DELETE", "/deployments/x", None, 422, "unsupported"),
    # what is no route
    ("GET", "/nothing", None, 404, "not_found"),
    ("PUT", "/sessions", {}, 405, "invalid_request"),
]


def filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    if not isinstance(value, str):
        return value
    for name, text in names.items():
        value = value.replace(f"{{{name}}}", text)
    return value


async def test_each_is_refused_by_name(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        names = {"model": model_id, "sampling": await api.sampler(model_id)}
        for method, path, body, status, code in REFUSED:
            reply = await api.http.request(
                method,
                f"/api/v1{filled(path, names)}",
                json=filled(body, names),
                headers={"X-Request-ID": "mine"},
            )
            what = f"{method} {path} {body}: {reply.status_code} {reply.text}"
            assert reply.status_code == status, what
            error = reply.json()
            assert error["error"] == code, what
            assert error["message"], what
            assert error["retryable"] is False
            assert error["request_id"] == reply.headers["X-Request-ID"] == "mine"
        await api.backward(model_id, 90)
        assert (await api.step(model_id, 91))["status"] == "done"  # none of them left a trace


async def test_a_body_that_is_not_json(home: Path) -> None:
    async with rest(home) as api:
        path = f"/api/v1/models/{await api.model()}/forward-backward-passes"
        for content in (b"{", b"\xff", b'{"payload": NaN}', b"[" * 10_000):
            reply = await api.http.post(path, content=content)
            assert (reply.status_code, reply.json()["error"]) == (400, "invalid_request")


PACK_FAULTS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"sha256": "0" * 64}, InvalidRequestError),
    ({"size_bytes": 3}, InvalidRequestError),
    ({"decoded_size_bytes": 3}, InvalidRequestError),
    ({"decoded_size_bytes": 2**40}, TooLargeError),
    ({"codec": "gzip"}, InvalidRequestError),
    ({"manifest": {"version": 2}}, InvalidRequestError),
    ({"manifest": {"tensor_pack": None}}, InvalidRequestError),
]


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize(("fault", "error"), PACK_FAULTS)
def test_a_pack_that_is_not_what_it_says(
    codec: str, fault: dict[str, Any], error: type[Exception]
) -> None:
    content, headers = packed(codec, **fault)
    with pytest.raises(error):
        parse(content, headers["Content-Type"], BackwardBody)


class Anything(Body):
    value: object = None


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [4]},
        {"shape": [-3]},
        {"shape": [2**40, 2**40]},
        {"shape": [1] * 9},
        {"offset": 999},
        {"offset": -8},
        {"dtype": "float16"},
        {"size_bytes": 2**40},
    ],
)
def test_a_reference_outside_its_pack(changes: dict[str, object]) -> None:
    reference = {"dtype": "int64", "shape": [3], "offset": 0, "size_bytes": 24, **changes}
    content, headers = packed(manifest={"request": {"value": {"$tensor": reference}}})
    with pytest.raises(InvalidRequestError):
        parse(content, headers["Content-Type"], Anything)


def test_a_zip_bomb_is_not_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    info = {
        "size_bytes": len(bomb),
        "sha256": hashlib.sha256(bomb).hexdigest(),
        "codec": "zstd",
        "decoded_size_bytes": 8,
    }
    manifest = json.dumps({"version": 1, "request": {}, "tensor_pack": info}).encode()
    content, headers = multipart(manifest, bomb)
    with pytest.raises(InvalidRequestError, match="8 bytes"):
        parse(content, headers["Content-Type"], Anything)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_multipart_is_refused_or_read(data: st.DataObject) -> None:
    content, headers = packed("zstd")
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, len(content)))
    damaged = content[:start] + data.draw(st.binary(max_size=8)) + content[end:]
    try:
        parse(damaged, headers["Content-Type"], BackwardBody)
    except InvalidRequestError:
        pass


async def test_projects_do_not_see_each_other(home: Path) -> None:
    async with running(home, auth=True) as server:
        mine, theirs = (server.keys.create(name)[1] for name in ("mine", "theirs"))
        async with server.http(mine) as http:
            made = await http.post(f"/api/v1/sessions/{UUID}/models", json={"base_model": "fake"})
            model = made.json()["id"]
            base = f"/api/v1/models/{model}"
            saved = (await http.post(f"{base}/checkpoints", json={})).json()
            checkpoint = saved["response"]["id"]
            artifact = (await http.post(f"/api/v1/checkpoints/{checkpoint}/export", json={})).json()
            export = (await http.post(f"{base}/export-sampler", json={})).json()["response"]
        sampling = f"/api/v1/sampling-sessions/{export['sampling_session_id']}"
        async with server.http(theirs) as http:
            for method, path, body in (
                ("GET", f"/api/v1/models/{model}", None),
                ("GET", f"/api/v1/training-runs/{model}", None),
                ("GET", f"{base}/checkpoints", None),
                ("POST", f"{base}/terminate", None),
                ("POST", f"{base}/forward-passes", passes("forward")),
                ("POST", f"{base}/forward-backward-passes", passes("forward_backward")),
                ("POST", f"{base}/optimizer-steps", {"payload": {"adam_params": {}}}),
                ("POST", f"{base}/checkpoints", {}),
                ("POST", f"{base}/export-sampler", {}),
                ("POST", f"{base}/export-hf", {}),
                ("POST", f"{base}/load", {"path": saved["response"]["path"]}),
                (
                    "PATCH",
                    f"{base}/checkpoints/ttl",
                    {"path": saved["response"]["path"], "ttl_seconds": 1},
                ),
                ("GET", f"/api/v1/operations/{saved['id']}", None),
                ("GET", f"/api/v1/checkpoints/{checkpoint}/artifacts", None),
                ("POST", f"/api/v1/checkpoints/{checkpoint}/export", {}),
                ("GET", f"/api/v1/artifacts/{artifact['id']}/download", None),
                ("GET", sampling, None),
                ("DELETE", sampling, None),
                ("POST", f"{sampling}/samples", {"prompt": CHUNKS}),
                ("POST", f"{sampling}/logprobs", {"prompt": CHUNKS}),
                ("POST", f"{sampling}/pause-generation", {}),
                ("POST", f"{sampling}/continue-generation", None),
                (
                    "POST",
                    f"/api/v1/sessions/{UUID}/sampling-sessions",
                    {"model_path": export["path"]},
                ),
                (
                    "POST",
                    f"/api/v1/sessions/{UUID}/metrics",
                    {"metrics": [{"model_id": model, "name": "x", "value": 1}]},
                ),
            ):
                reply = await http.request(method, path, json=body)
                assert reply.status_code == 404, f"{method} {path}: {reply.text}"
            assert (await http.get("/api/v1/models")).json()["items"] == []
        async with server.http() as http:
            reply = await http.get("/api/v1/models")
            assert (reply.status_code, reply.json()["error"]) == (401, "unauthenticated")
            reply = await http.get("/api/v1/models", headers={"X-WEAVER-API-KEY": mine})
            assert len(reply.json()["items"]) == 1
