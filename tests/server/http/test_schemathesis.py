"""Requests made from the OpenAPI document, valid and invalid ones: none is a defect of the server.

The Weaver REST interface is not in the document: valid requests of it are damaged in one place.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.fake_engine import FakeEngine
from tests.server.adapters.helpers import CHUNKS, DATUM, passes
from tests.server.http.helpers import serving
from weaver import Datum, ServiceClient, wire
from weaver.protocol import MEDIA_TYPE, CreateModel, ForwardBackward, Sample, Submission
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from schemathesis import Case
    from schemathesis.models import APIOperation

load_all_checks()
HELD = CHECKS.get_by_names(
    ["not_a_server_error", "content_type_conformance", "response_schema_conformance"]
)
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
calm = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
FEW_AND_MANY = pytest.mark.parametrize(
    "examples", [8, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("server") / "home"
    with serving(FakeEngine(), ServerSettings(home=home, port=0, auth=False)) as server:
        yield server.address


@FEW_AND_MANY
def test_no_request_is_a_defect(address: str, examples: int) -> None:
    schemathesis.openapi.media_type(MEDIA_TYPE, messages())
    schemathesis.serializer(MEDIA_TYPE)(lambda context, value: value)
    document = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 20
    for operation in operations:
        with ServiceClient(base_url=address) as service:
            run_id = service.create_model("fake", {"rank": 2}).model_id
        opened = httpx.post(f"{address}/v1/sessions", json={}).json()["session_id"]
        check(operation, {"run_id": run_id, "session_id": opened}, examples)


def check(operation: APIOperation[Any, Any, Any], ids: dict[str, str], examples: int) -> None:
    """Sends requests of it, half of them at a session or run that there is."""
    names = {parameter.name for parameter in operation.path_parameters}
    known = {name: value for name, value in ids.items() if name in names}
    strategies = [operation.as_strategy(mode) for mode in MODES]
    if known:
        strategies += [operation.as_strategy(mode, path_parameters=known) for mode in MODES]

    @seed(4)
    @settings(calm, max_examples=examples)
    @given(st.one_of(strategies))
    def send(case: Case) -> None:
        if "timeout" in (case.query or {}):
            case.query["timeout"] = 0
        case.call_and_validate(checks=HELD)

    send()


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.just("x" * 5000)
    | st.just(2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def damaged(tree: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The tree with something else in one place of it."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        return {**tree, key: damaged(tree[key], draw)}
    if isinstance(tree, list) and tree and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], damaged(tree[at], draw), *tree[at + 1 :]]
    return draw(ANYTHING)


@st.composite
def messages(draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """Messages of submissions with a damaged header, behind which all arrays are still there."""
    data = wire.encode(draw(st.sampled_from(SUBMISSIONS)))
    end = 16 + int.from_bytes(data[4:8], "little")
    header = json.dumps(damaged(json.loads(data[16:end]), draw)).encode()
    return data[:4] + len(header).to_bytes(4, "little") + data[8:16] + header + data[end:]


SUBMISSIONS = (
    [
        Submission(id="a", operation=CreateModel(base_model="fake"), note="mine"),
        Submission(id="b", operation=Sample(sampler_id="base:fake", prompt="text")),
    ],
    [
        Submission(
            id="c",
            run_id="run",
            seq=1,
            operation=ForwardBackward(
                datums=(
                    Datum(
                        model_input=list(range(40)),
                        loss_fn_inputs={"target_tokens": list(range(40)), "weights": [0.5] * 40},
                    ),
                ),
                loss_fn="cross_entropy",
            ),
        )
    ],
)


@FEW_AND_MANY
def test_no_request_to_the_rest_interface_is_a_defect(address: str, examples: int) -> None:
    with httpx.Client(base_url=f"{address}/api/v1", timeout=60) as http:
        session = http.post("/sessions", json={}).json()["id"]
        lora = {"rank": 2, "train_attn": True, "train_mlp": True, "train_unembed": True, "seed": 1}
        model = {"base_model": "fake", "lora_config": lora, "user_metadata": {"a": 1}}
        run = f"/models/{http.post(f'/sessions/{session}/models', json=model).json()['id']}"
        http.post(f"{run}/forward-backward-passes", json=passes("forward_backward"))
        saved = http.post(f"{run}/checkpoints", json={"name": "a"}).json()["response"]
        export = http.post(f"{run}/export-sampler", json={}).json()["response"]
        sampling = f"/sampling-sessions/{export['sampling_session_id']}"
        params = {"temperature": 1.0, "top_k": -1, "max_tokens": 2, "stop": ["a"], "seed": 1}
        adam = {"learning_rate": 0.1, "beta1": 0.9, "grad_clip_norm": 1.0}
        point = {"model_id": run[8:], "name": "x", "value": 1.0, "step": 1, "occurred_at": None}
        given_config = {"temperature": 1.0}
        valid: list[tuple[str, str, Any]] = [
            ("POST", "/sessions", {"tags": ["a"], "labels": {"a": "b"}, "user_metadata": {}}),
            ("POST", f"/sessions/{session}/metrics", {"metrics": [point]}),
            ("POST", f"/sessions/{session}/models", model),
            ("POST", f"{run}/forward-passes", passes("forward", config=given_config)),
            ("POST", f"{run}/forward-backward-passes", passes("forward_backward", data=[DATUM])),
            ("POST", f"{run}/optimizer-steps", {"payload": {"seq_id": 1, "adam_params": adam}}),
            ("POST", f"{run}/checkpoints", {"type": "sampling", "name": "b", "ttl_seconds": 60}),
            ("POST", f"{run}/load", {"path": saved["path"], "include_optimizer": False}),
            ("POST", f"{run}/export-sampler", {"path": "s", "ttl_seconds": 60}),
            ("POST", f"{run}/export-hf", {"format": "huggingface", "ttl_seconds": 60}),
            ("POST", f"/checkpoints/{saved['id']}/export", {"merge_adapter": False}),
            ("PATCH", f"{run}/checkpoints/ttl", {"path": saved["path"], "ttl_seconds": 60}),
            ("POST", f"/sessions/{session}/sampling-sessions", {"model_path": export["path"]}),
            ("POST", f"{sampling}/samples", {"prompt": CHUNKS, "sampling_params": params}),
            ("POST", f"{sampling}/logprobs", {"prompt": CHUNKS, "loss_fn_config": given_config}),
            ("POST", f"{sampling}/pause-generation", {"mode": "in_place"}),
        ]

        @seed(4)
        @settings(calm, max_examples=10 * examples)
        @given(st.sampled_from(valid), st.data())
        def send(request: tuple[str, str, Any], data: st.DataObject) -> None:
            method, path, body = request
            content = json.dumps(damaged(body, data.draw))
            reply = http.request(method, path, content=content)
            assert reply.status_code < 500, f"{method} {path} {content[:300]}: {reply.text}"
            if reply.status_code >= 400:
                assert {"error", "message", "retryable", "request_id"} <= set(reply.json())
            http.post(f"{sampling}/continue-generation")

        send()
