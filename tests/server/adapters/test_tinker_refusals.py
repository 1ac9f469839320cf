"""Tinker's protocol: bad requests are told at once, in its envelope, and harm nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.adapters.tinker import ADAM, PROMPT, Tinker, passing, tinker
from tests.server.http.helpers import running
from weaver.server.adapters.tinker import messages, passes
from weaver.server.adapters.tinker.tensors import MOST_CELLS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio
LONG = "x" * 5000
M, S, Q = "{M}", "{S}", "{Q}"
"""Stand for the ids of a model, of its session and of a sampling session."""
OPEN = {"session_id": S, "sampling_session_seq_id": 9}
LOAD = {"session_id": S, "model_seq_id": 9}
STEP = {"model_id": M, "seq_id": 1}
SAMPLE = {"sampling_session_id": Q, "seq_id": 1, "prompt": PROMPT}
JSON_PASS = {"data": [], "loss_fn": "cross_entropy"}
WEIGHTS = f"training_runs/{M}/checkpoints/weights"

BAD: list[tuple[str, str, Any, int]] = [
    ("POST", "create_session", b"{", 400),
    ("POST", "create_session", b"[]", 400),
    ("POST", "create_session", {"user_metadata": 3}, 400),
    ("POST", "create_session", {"display_name": 3}, 400),
    ("POST", "create_session", {"user_metadata": {"a": "x" * 2**17}}, 413),
    ("POST", "create_session", b'{"a":' * 9000 + b"1" + b"}" * 9000, 400),
    ("POST", "session_heartbeat", {}, 400),
    ("POST", "session_heartbeat", {"session_id": ""}, 400),
    ("POST", "session_heartbeat", {"session_id": LONG}, 400),
    ("POST", "session_heartbeat", {"session_id": "session-0"}, 404),
    ("POST", "create_model", {}, 400),
    ("POST", "create_model", {"session_id": S, "model_seq_id": -1, "base_model": "fake"}, 400),
    ("POST", "create_model", {"session_id": S, "model_seq_id": "x", "base_model": "fake"}, 400),
    ("POST", "create_model", {"session_id": S, "model_seq_id": 2**63, "base_model": "fake"}, 400),
    ("POST", "create_model", {"session_id": "s", "model_seq_id": 1, "base_model": "fake"}, 404),
    ("POST", "create_model", {"session_id": S, "model_seq_id": 1, "base_model": LONG}, 422),
    (
        "POST",
        "create_model",
        {"session_id": S, "model_seq_id": 1, "base_model": "fake", "lora_config": {"rank": 0}},
        422,
    ),
    (
        "POST",
        "create_model",
        {
            "session_id": S,
            "model_seq_id": 1,
            "base_model": "fake",
            "optimizer_config": {"type": "dimuon"},
        },
        422,
    ),
    ("POST", "get_info", {}, 400),
    ("POST", "get_info", {"model_id": "nobody"}, 404),
    ("POST", "get_info", {"model_id": "session-0:train:0"}, 404),
    ("POST", "get_info", {"model_id": "session-0:train:0:0/../x"}, 404),
    ("POST", "optim_step", {}, 400),
    ("POST", "optim_step", {"model_id": M}, 400),
    ("POST", "optim_step", {"model_id": "nobody", "seq_id": 1}, 400),
    ("POST", "optim_step", {"model_id": f"{S}:train:8", "seq_id": 1}, 404),
    ("POST", "optim_step", {**STEP, "adam_params": {"learning_rate": -1}}, 422),
    ("POST", "optim_step", {**STEP, "adam_params": {"learning_rate": "x"}}, 400),
    ("POST", "optim_step", b'{"model_id": "{M}", "seq_id": 1, "adam_params": NaN}', 400),
    ("POST", "optim_step", {**STEP, "optimizer_params": {"type": "dimuon"}}, 422),
    ("POST", "save_weights", STEP, 400),
    ("POST", "save_weights", {**STEP, "path": ""}, 400),
    ("POST", "save_weights", {**STEP, "path": LONG}, 400),
    ("POST", "save_weights", {**STEP, "path": "a", "ttl_seconds": 0}, 400),
    ("POST", "save_weights_for_sampler", STEP, 400),
    (
        "POST",
        "save_weights_for_sampler",
        {**STEP, "path": "a", "sampling_session_seq_id": 0},
        400,
    ),
    ("POST", "save_weights_external", STEP, 400),
    ("POST", "save_weights_external", {**STEP, "path": LONG}, 400),
    ("POST", "save_weights_external", {**STEP, "path": "a", "age_encryption_recipients": 3}, 400),
    (
        "POST",
        "save_weights_external",
        {**STEP, "path": "a", "age_encryption_recipients": ["age1x"]},
        422,
    ),
    ("POST", "load_weights", {}, 400),
    ("POST", "load_weights", {**LOAD, "path": "a"}, 400),
    ("POST", "load_weights", {**LOAD, "path": "tinker://a/b/c/d"}, 400),
    ("POST", "load_weights", {**LOAD, "path": "tinker://a/else/c"}, 400),
    ("POST", "load_weights", {**LOAD, "path": "tinker://nobody/weights/c"}, 404),
    ("POST", "load_weights", {**LOAD, "path": f"tinker://{M}/weights/nothing"}, 404),
    ("POST", "load_weights", {**LOAD, "path": f"tinker://{M}/weights/.."}, 422),
    ("POST", "load_weights", {"session_id": S, "path": f"tinker://{M}/weights/a"}, 400),
    ("POST", "forward_backward", b"", 400),
    ("POST", "forward_backward", {}, 400),
    ("POST", "forward_backward", {**STEP, "forward_backward_input": {}}, 400),
    (
        "POST",
        "forward_backward",
        {**STEP, "forward_backward_input": {**JSON_PASS, "data": [3]}},
        400,
    ),
    (
        "POST",
        "forward",
        {
            **STEP,
            "forward_input": {
                **JSON_PASS,
                "data": [
                    {"model_input": {"chunks": [{"type": "image"}]}, "loss_fn_inputs": {}},
                ],
            },
        },
        422,
    ),
    (
        "POST",
        "forward",
        {
            **STEP,
            "forward_input": {
                **JSON_PASS,
                "data": [
                    {
                        "model_input": PROMPT,
                        "loss_fn_inputs": {"target_tokens": {"data": [1], "shape": [1, 1, 1]}},
                    }
                ],
            },
        },
        422,
    ),
    (
        "POST",
        "forward",
        {
            **STEP,
            "forward_input": {
                **JSON_PASS,
                "data": [{"model_input": {"chunks": [{"tokens": "a"}]}, "loss_fn_inputs": {}}],
            },
        },
        422,
    ),
    ("POST", "create_sampling_session", {}, 400),
    ("POST", "create_sampling_session", OPEN, 400),
    ("POST", "create_sampling_session", {**OPEN, "base_model": "none"}, 404),
    ("POST", "create_sampling_session", {**OPEN, "model_path": "weaver://a/sampler/b"}, 400),
    ("POST", "create_sampling_session", {**OPEN, "model_path": "tinker://a/weights/b"}, 404),
    ("GET", "samplers/x", None, 400),
    ("GET", f"samplers/{S}:sample:8", None, 404),
    ("POST", "asample", {}, 400),
    ("POST", "asample", {**SAMPLE, "sampling_session_id": f"{S}:sample:8"}, 404),
    ("POST", "asample", {**SAMPLE, "sampling_session_id": "x"}, 400),
    ("POST", "asample", {**SAMPLE, "prompt": 3}, 400),
    ("POST", "asample", {**SAMPLE, "prompt": {"chunks": 3}}, 400),
    ("POST", "asample", {**SAMPLE, "prompt": {"chunks": [{"type": "image"}]}}, 422),
    ("POST", "asample", {**SAMPLE, "prompt": {"chunks": [{"tokens": ["a"]}]}}, 422),
    ("POST", "asample", {**SAMPLE, "num_samples": 0}, 400),
    ("POST", "asample", {**SAMPLE, "num_samples": 2**40}, 400),
    ("POST", "asample", {**SAMPLE, "sampling_params": {"temperature": -1}}, 422),
    ("POST", "asample", {**SAMPLE, "sampling_params": {"top_p": 2}}, 422),
    ("POST", "asample", {**SAMPLE, "sampling_params": {"max_tokens": -3}}, 422),
    ("POST", "asample", {**SAMPLE, "sampling_params": {"stop": {"a": 1}}}, 400),
    ("POST", "asample", {**SAMPLE, "sampling_params": {"stop": ["", "a"]}}, 422),
    ("POST", "asample", {**SAMPLE, "topk_prompt_logprobs": 257}, 400),
    ("POST", "asample", {**SAMPLE, "topk_prompt_logprobs": -1}, 400),
    ("POST", "asample", {**SAMPLE, "topk_sample_logprobs": 2**40}, 400),
    ("POST", "asample", {**SAMPLE, "topk_sample_logprobs": "x"}, 400),
    ("POST", "asample", {**SAMPLE, "prompt_alt_tokens_k": 1}, 422),
    ("POST", "asample", {**SAMPLE, "prompt_logprobs_last_n": 1}, 422),
    ("POST", "asample", {**SAMPLE, "prompt_logprobs": True, "prompt_logprobs_last_n": 0}, 422),
    ("POST", "asample", {**SAMPLE, "prompt_logprobs": True, "prompt_logprobs_last_n": 3}, 422),
    *(
        ("POST", "asample", {**SAMPLE, "target_prompt_logprobs": wrong}, 422)
        for wrong in (
            {},
            {"data": [1, 2], "shape": [2]},
            {"data": [1, 2, 3], "shape": [3, 1]},
            {"data": [1, 2, 3], "shape": [2, 1]},
            {"data": [0.5, 2.0], "shape": [2, 1]},
            {"data": ["a", "b"], "shape": [2, 1]},
            {"data": [1], "shape": [2, 1], "sparse_crow_indices": [0, 1]},
            {
                "data": [1],
                "shape": [2, 1],
                "sparse_crow_indices": [0, 1, 1],
                "sparse_col_indices": [1],
            },
            {"data": [1], "shape": [2, 1], "sparse_crow_indices": [0, 1, 1]},
            {"data": [1], "shape": [2, 10**9], "sparse_crow_indices": "abc"},
        )
    ),
    ("POST", "asample", {**SAMPLE, "target_prompt_logprobs": 3}, 400),
    ("POST", "asample", {**SAMPLE, "target_prompt_logprobs": {"shape": "x"}}, 400),
    ("POST", "retrieve_future", {}, 400),
    ("POST", "retrieve_future", {"request_id": LONG}, 400),
    ("POST", "retrieve_future", {"request_id": "x"}, 400),
    ("POST", "retrieve_future", {"request_id": f"{M}:99"}, 404),
    ("POST", "retrieve_future", {"request_id": "session-0:train:0:1"}, 404),
    ("POST", "retrieve_futures", {"target": {"sampling_session_id": "x"}}, 400),
    ("POST", "cancel_future", {"request_id": "x"}, 400),
    ("POST", "create_custom_loss", {"session_id": S}, 422),
    ("POST", "copy_weights", {"source_path": "tinker://x/weights/a"}, 422),
    ("POST", "sessions/search", {}, 422),
    ("PUT", f"sessions/{S}/project", {"project_id": "p"}, 422),
    ("GET", f"sessions/{S}/trace_export", None, 422),
    ("GET", "audit", None, 422),
    ("GET", "billing/usage/events", None, 422),
    ("POST", "weights_info", {"tinker_path": "a"}, 400),
    ("POST", "weights_info", {"tinker_path": "tinker://a/weights/b"}, 404),
    ("GET", "training_runs?limit=0", None, 422),
    ("GET", "training_runs/nobody", None, 404),
    ("GET", "training_runs/nobody/checkpoints", None, 404),
    ("DELETE", f"{WEIGHTS}/nothing", None, 404),
    ("DELETE", f"training_runs/{M}/checkpoints/else/a", None, 422),
    ("PUT", f"{WEIGHTS}/nothing/ttl", {"ttl_seconds": 5}, 404),
    ("PUT", f"{WEIGHTS}/nothing/ttl", {"ttl_seconds": -5}, 400),
    ("POST", f"{WEIGHTS}/a/publish", {}, 422),
    ("GET", f"{WEIGHTS}/nothing/archive", None, 404),
    ("GET", f"{WEIGHTS}/nothing/external_weights_urls", None, 404),
    ("GET", "weights_files/x/checkpoint.tar", None, 403),
    ("GET", "weights_files/x/manifest.json", None, 403),
    ("GET", "sessions/session-0", None, 404),
    ("PUT", "optim_step", None, 405),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def sampling(api: Tinker, session_id: str) -> str:
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fake"}
    return str((await api.call("create_sampling_session", body))["sampling_session_id"])


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Tinker]:
    async with tinker(tmp_path) as client:
        yield client


def named(value: Any, names: dict[str, str]) -> Any:
    """The value with ids in the place of what stands for them."""
    match value:
        case str():
            for mark, name in names.items():
                value = value.replace(mark, name)
            return value
        case bytes():
            return named(value.decode(), names).encode()
        case dict():
            return {key: named(item, names) for key, item in value.items()}
        case list():
            return [named(item, names) for item in value]
    return value


async def test_bad_requests_are_refused_at_once_and_harm_nothing(api: Tinker) -> None:
    session_id = await api.session()
    model_id = await api.model(session_id)
    names = {M: model_id, S: session_id, Q: await sampling(api, session_id)}
    for method, path, given, status in BAD:
        body = named(given, names)
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        began = time.monotonic()
        reply = await api.http.request(
            method, f"/api/v1/{named(path, names)}", **({} if body is None else content)
        )
        assert reply.status_code == status, (path, given, reply.text[:300])
        assert time.monotonic() - began < 1, path
        assert "detail" in reply.json() or status == 405, path
    await api.result(await api.backward(model_id, 1))
    assert (await api.result(await api.step(model_id, 2)))["metrics"]["step"] == 1


PASSES: list[tuple[bytes, str]] = [
    (b"\xff" * 40, "no protobuf"),
    (b"\x1a\xff\xff\xff\xff\x7f", "ForwardBackwardRequest"),
    (b"\x1a\x00" * (passes.MOST_FIELDS + 1), "fields"),
    (b"\x1a\x82\x80\x10" + b"\x0a\x00" * 131_073, "fields"),
    (passing(M, 1)[:-3], "ForwardBackwardRequest"),
]


async def test_a_place_before_the_first_is_refused(api: Tinker) -> None:
    model_id = await api.model()
    for seq_id in (-1, 0):
        refused = await api.backward(model_id, seq_id, status=422)
        assert "seq" in refused["detail"]
    targets = {"target_tokens": {"data": [2, 3, 4], "shape": 3}}
    given = {"data": [{"model_input": PROMPT, "loss_fn_inputs": targets}], "loss_fn": "x"}
    body = {"model_id": model_id, "seq_id": 1, "forward_input": given}
    assert "shape" in (await api.call("forward", body, status=400))["detail"]


@pytest.mark.parametrize(("content", "what"), PASSES)
async def test_messages_that_cannot_be_read_are_refused(
    api: Tinker, content: bytes, what: str
) -> None:
    began = time.monotonic()
    reply = await api.http.post(
        "/api/v1/forward_backward", content=content, headers={"Content-Type": messages.MEDIA_TYPE}
    )
    assert reply.status_code in (400, 413), reply.text
    assert what in reply.json()["detail"]
    assert time.monotonic() - began < 1


def tensors(**changes: Any) -> bytes:
    """A pass whose targets are changed."""
    request = messages.ForwardBackwardRequest.FromString(passing("m", 1))
    tensor = request.data[0].loss_fn_inputs["target_tokens"]
    for name, value in changes.items():
        if name == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        elif name == "sparse":
            tensor.sparse_csr.values = np.array(value.get("values", []), "<i8").tobytes()
            tensor.sparse_csr.crow_indices = np.array(value.get("crow", []), "<i8").tobytes()
            tensor.sparse_csr.col_indices = np.array(value.get("col", []), "<i8").tobytes()
        elif name == "image":
            request.data[0].model_input.add().image.data = value
        else:
            setattr(tensor, name, value)
    return bytes(request.SerializeToString())


@pytest.mark.parametrize(
    "changes",
    [
        {"dense": b"123"},
        {"dtype": 0},
        {"dtype": 4},
        {"dtype": 17},
        {"shape": [2**62]},
        {"shape": [-1]},
        {"shape": [1, 3, 1]},
        {"shape": [3, 2]},
        {"shape": [0, 2**62]},
        {"shape": [3, 257], "dense": b"0" * 8 * 3 * 257},
        {"shape": [1] * 30_000},
        {"sparse": {}},
        {"shape": [3, 2], "sparse": {"crow": [0, 1, 1], "col": [0], "values": [5]}},
        {"shape": [3, 2], "sparse": {"crow": [0, 1, 1, 2], "col": [0], "values": [5]}},
        {"shape": [3, 2], "sparse": {"crow": [0, 2, 1, 1], "col": [0], "values": [5]}},
        {"shape": [3, 2], "sparse": {"crow": [1, 1, 1, 1], "col": [0], "values": [5]}},
        {
            "shape": [3, 2],
            "sparse": {"crow": [0, 2**63 - 1, -(2**63), 1], "col": [0], "values": [5]},
        },
        {"shape": [3, 2], "sparse": {"crow": [0, 1, 1, 1], "col": [2], "values": [5]}},
        {"shape": [3, 2], "sparse": {"crow": [0, 1, 1, 1], "col": [-1], "values": [5]}},
        {"shape": [3, 257], "sparse": {"crow": [0, 1, 1, 1], "col": [0], "values": [5]}},
        {"shape": [-1, 2], "sparse": {"crow": [], "col": [], "values": []}},
        {"shape": [3, 0], "sparse": {"crow": [0] * 4, "col": [], "values": []}},
        {"image": b"x"},
    ],
    ids=str,
)
async def test_tensors_that_cannot_be_are_refused(api: Tinker, changes: dict[str, Any]) -> None:
    reply = await api.http.post(
        "/api/v1/forward_backward",
        content=tensors(**changes),
        headers={"Content-Type": messages.MEDIA_TYPE},
    )
    assert reply.status_code == 422, reply.text
    assert "loss_fn_inputs" in reply.text or "model_input" in reply.text


async def test_a_few_bytes_do_not_become_many_cells(api: Tinker) -> None:
    rows = MOST_CELLS // 256 + 1
    request = messages.ForwardBackwardRequest.FromString(passing("m", 1, tokens=[1] * rows))
    tensor = request.data[0].loss_fn_inputs["target_tokens"]
    tensor.sparse_csr.crow_indices = np.zeros(rows + 1, "<i8").tobytes()
    del tensor.shape[:]
    tensor.shape.extend([rows, 256])
    headers = {"Content-Type": messages.MEDIA_TYPE}
    content = request.SerializeToString()
    reply = await api.http.post("/api/v1/forward_backward", content=content, headers=headers)
    assert reply.status_code == 413 and "target_tokens" in reply.json()["detail"]


async def test_bad_datums_are_failures_of_their_request(api: Tinker) -> None:
    """Whoever sends them has sent more already, so that they must take their place."""
    model_id = await api.model()
    wrong: list[dict[str, Any]] = [
        {"loss_fn": "none"},
        {"loss_fn": "ppo"},
        {"nonsense": 3.0},
        {"tokens": [1, 2]},
        {"tokens": [10**6, 2, 3]},
        {"inputs": {"target_tokens": [10**6, 2, 3]}},
        {"inputs": {"nonsense": [1.0, 1.0, 1.0]}},
        {"loss_fn": "ppo", "clip_low_threshold": 3.0},
    ]
    for seq_id, given in enumerate(wrong, start=1):
        failed = await api.result(await api.backward(model_id, seq_id, **given))
        assert failed["category"] == "user", given
        assert failed["error"], given


async def test_a_key_is_asked_for_and_opens_its_project_alone(tmp_path: Path) -> None:
    async with running(tmp_path, auth=True) as server, server.http() as http:
        assert (await http.post("/api/v1/client/config", json={})).status_code == 401
        mine, theirs = (server.keys.create(project)[1] for project in ("mine", "theirs"))
        http.headers["X-API-Key"] = f"tml-{mine}"
        api = Tinker(http)
        model_id = await api.model()
        session_id = model_id.partition(":")[0]
        await api.result(await api.step(model_id, 1))
        called = await sampling(api, session_id)
        save = {"model_id": model_id, "path": "a", "seq_id": 2}
        path = (await api.result(await api.call("save_weights", save)))["path"]
        http.headers["X-API-Key"] = f"tml-{theirs}"
        other = await api.session()
        seen: list[tuple[str, str, Any]] = [
            ("POST", "session_heartbeat", {"session_id": session_id}),
            ("POST", "get_info", {"model_id": model_id}),
            ("POST", "optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": ADAM}),
            ("POST", "retrieve_future", {"request_id": f"{model_id}:1"}),
            ("POST", "asample", {**SAMPLE, "sampling_session_id": called}),
            ("POST", "weights_info", {"tinker_path": path}),
            ("POST", "load_weights", {"session_id": other, "model_seq_id": 0, "path": path}),
            ("GET", f"samplers/{called}", None),
            ("GET", f"training_runs/{model_id}", None),
            ("GET", f"training_runs/{model_id}/checkpoints", None),
            ("DELETE", f"training_runs/{model_id}/checkpoints/weights/a", None),
            ("GET", f"sessions/{session_id}", None),
            ("POST", f"sessions/{session_id}/finish", {}),
        ]
        for method, where, body in seen:
            await api.call(where, body, method=method, status=404)
        assert (await api.get("training_runs"))["training_runs"] == []
        assert (await api.get("checkpoints"))["checkpoints"] == []
        assert (await api.get("sessions"))["sessions"] == [other]
        http.headers["X-API-Key"] = f"tml-{mine}"
        assert (await api.get(f"training_runs/{model_id}"))["training_run_id"] == model_id
