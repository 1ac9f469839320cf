"""Each route of the Weaver REST interface, over ASGI and the fake engine."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.fake_engine import FakeEngine
from tests.server.adapters.helpers import CHUNKS, TARGETS, Rest, packed, passes, rest
from tests.server.http.helpers import running
from weaver.server.adapters.weaver_rest.answers import sampling_session_of
from weaver.server.settings import Limits

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


async def test_sessions_are_ids_without_rights(home: Path) -> None:
    async with rest(home) as api:
        body = {"tags": ["a"], "name": "n", "labels": {"k": "v"}, "sdk_version": "1.19.2"}
        session = (await api.call("POST", "/sessions", body, status=201))["id"]
        assert (await api.call("GET", f"/sessions/{session}")) == {"id": session}
        await api.call("POST", f"/sessions/{session}/heartbeat", status=204)
        await api.call("GET", "/sessions/nobody", status=422)


async def test_a_model_is_made_listed_and_left(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model(base_model="fake:262144", lora_config={"rank": 8})
        model = await api.call("GET", f"/models/{model_id}")
        assert (model["base_model"], model["training_mode"]) == ("fake", "lora")
        assert model["lora_config"]["rank"] == 8
        await api.backward(model_id)
        assert (await api.call("GET", f"/training-runs/{model_id}"))["last_seq_id"] == 1
        for noun in ("models", "training-runs"):
            page = await api.call("GET", f"/{noun}?limit=25&offset=0")
            assert [item["id"] for item in page["items"]] == [model_id]
            assert page["pagination"]["total_count"] == 1
            assert (await api.call("GET", f"/{noun}?offset=1"))["items"] == []
        await api.call("POST", f"/models/{model_id}/terminate")
        await api.step(model_id)  # nothing was destroyed


async def test_models_that_can_be_trained_are_listed(home: Path) -> None:
    async with rest(home) as api:
        [model] = (await api.call("GET", "/supported-models?limit=100&offset=0"))["items"]
        assert (model["name"], model["status"]) == ("fake", "healthy")
        [model] = (await api.call("GET", "/model-catalog?limit=100&offset=0"))["items"]
        assert model["training_modes"] == ["lora", "full_ft"]


async def test_passes_and_steps_answer_at_once(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        operation = await api.backward(model_id)
        assert operation["status"] == "done"
        result = operation["response"]["result"]
        assert len(result["loss_fn_outputs"][0]["logprobs"]) == 3
        assert result["metrics"] == operation["response"]["metrics"]
        stepped = (await api.step(model_id))["response"]
        assert stepped["metrics"] == stepped["result"]["metrics"]
        assert stepped["metrics"]["step"] == 1
        again = await api.call("GET", f"/operations/{operation['id']}")
        assert again == operation


async def test_a_custom_loss_is_a_forward_and_its_surrogate(home: Path) -> None:
    """c = -w/n gives the gradient of the mean, as `cross_entropy` does."""
    async with rest(home) as api:
        built_in, custom = await api.model(), await api.model()
        await api.backward(built_in)
        expected = (await api.step(built_in))["response"]["metrics"]["grad_norm"]
        inputs = {"target_tokens": TARGETS, "weights": [1.0, 1.0, 1.0], "mine": [1.0]}
        body = passes(
            "forward",
            loss_fn="forward_logprob",
            data=[{"datum_id": "d", "model_input": CHUNKS, "loss_fn_inputs": inputs}],
        )
        operation = await api.call("POST", f"/models/{custom}/forward-passes", body)
        [output] = operation["response"]["result"]["loss_fn_outputs"]
        assert output["datum_id"] == "d"
        assert len(output["logprobs"]) == 3
        weights = {"surrogate_weights": {"data": [-1 / 3] * 3, "dtype": "float32"}}
        datum = {"model_input": CHUNKS, "loss_fn_inputs": inputs | weights}
        body = passes("forward_backward", loss_fn="surrogate", data=[datum], seq_id=2)
        await api.call("POST", f"/models/{custom}/forward-backward-passes", body)
        norm = (await api.step(custom, 3))["response"]["metrics"]["grad_norm"]
        assert math.isclose(norm, expected, rel_tol=1e-6)


async def test_without_targets_a_forward_scores_the_input_itself(home: Path) -> None:
    async with rest(home) as api:
        path = f"/models/{await api.model()}/forward-passes"
        answers = []
        for inputs in ({}, {"target_tokens": [1, 2, 3]}):
            data = [{"model_input": CHUNKS, "loss_fn_inputs": inputs}]
            body = passes("forward", loss_fn="forward_logprob", data=data)
            answers.append((await api.call("POST", path, body))["response"])
        assert answers[0] == answers[1]


async def test_names_of_other_programs_are_understood(home: Path) -> None:
    async with rest(home) as api:
        inputs = {
            "target_tokens": TARGETS,
            "logprobs": [-1.0] * 3,
            "advantages": [1.0] * 3,
            "loss_mask": [0, 1, 1],
        }
        data = [{"model_input": CHUNKS, "loss_fn_inputs": inputs}]
        path = f"/models/{await api.model()}/forward-backward-passes"
        config = {"entropy_coeff": 0.1, "temperature": 0.5, "enable_debug_dump": False}
        for seq_id, (loss_fn, given) in enumerate(
            [("importance_sampling", config), ("ppo_clip", {"temperature": 0.5})], start=1
        ):
            body = passes(
                "forward_backward", loss_fn=loss_fn, data=data, config=given, seq_id=seq_id
            )
            metrics = (await api.call("POST", path, body))["response"]["metrics"]
            assert metrics["weight_sum"] == 2


@pytest.mark.parametrize("codec", ["raw", "zstd"])
async def test_binary_tensors_are_the_same_as_json(home: Path, codec: str) -> None:
    async with rest(home) as api:
        path = f"/api/v1/models/{await api.model()}/forward-backward-passes"
        content, headers = packed(codec)
        reply = await api.http.post(path, content=content, headers=headers)
        inputs = {"target_tokens": TARGETS, "weights": [0.0, 1.0, 1.0]}
        data = [{"model_input": CHUNKS, "loss_fn_inputs": inputs}]
        body = passes("forward_backward", data=data, seq_id=2)
        plain = await api.http.post(path, json=body)
        assert reply.json()["response"] == plain.json()["response"]


async def test_what_takes_long_is_polled_for(home: Path) -> None:
    def slow(name: str, argument: object) -> None:
        if name == "optim_step":
            time.sleep(1.3)

    async with rest(home, FakeEngine(hook=slow)) as api:
        model_id = await api.model()
        await api.backward(model_id)
        began = anyio.current_time()
        pending = await api.step(model_id)
        assert pending["status"] == "pending"
        assert 0.9 < anyio.current_time() - began < 1.25
        done = await api.call("GET", f"/operations/{pending['id']}")
        assert done["response"]["metrics"]["step"] == 1
        assert anyio.current_time() - began < 2


async def test_a_failed_operation_is_an_operation(home: Path) -> None:
    async with rest(home) as api:
        operation = await api.step(await api.model())
        assert operation["status"] == "error"
        assert operation["error_code"] == "no_gradients"
        assert "no_gradients" not in operation["error_message"]
        assert operation["retryable"] is False


async def test_a_resend_gets_the_first_answer(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        first, second = await api.backward(model_id), await api.backward(model_id)
        assert first["id"] == second["id"]
        await api.step(model_id, **TRACE)
        assert (await api.step(model_id, **TRACE))["response"]["metrics"]["step"] == 1
        assert (await api.call("GET", f"/models/{model_id}"))["step"] == 1


async def test_an_equal_request_of_another_call_is_no_resend(home: Path) -> None:
    """A program that was started anew counts from 1 again."""
    async with rest(home) as api:
        model_id = await api.model()
        other = {"traceparent": TRACE["traceparent"].replace("b7ad", "c7ad")}
        first = await api.backward(model_id, **TRACE)
        assert (await api.backward(model_id, **other))["id"] != first["id"]
        sampling = await api.sampler(model_id)
        body = {"prompt": CHUNKS}
        path = f"/sampling-sessions/{sampling}/logprobs"
        replies = [await api.call("POST", path, body, **TRACE) for _ in range(2)]
        assert replies[0]["id"] == replies[1]["id"]
        assert (await api.call("POST", path, body))["id"] != replies[0]["id"]


async def test_a_resend_of_what_is_refused_is_refused_too(home: Path) -> None:
    """Also where it comes while the first is on its way to the journal."""
    async with running(home, limits=Limits(pending_operations=0)) as server, server.http() as http:
        path = f"/api/v1/sampling-sessions/{sampling_session_of('base:fake')}/samples"
        replies: list[Any] = []

        async def sample() -> None:
            replies.append(await http.post(path, json={"prompt": CHUNKS}, headers=TRACE))

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(sample)
        refusals = [(reply.status_code, reply.json()["error"]) for reply in replies]
        assert refusals == [(429, "quota_exceeded")] * 3


async def test_a_closed_session_is_followed_by_another(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        [session] = (await api.http.get("/v1/sessions")).json()
        await api.http.delete(f"/v1/sessions/{session['session_id']}")
        operation = await api.backward(model_id)
        assert operation["status"] == "done"
        assert await api.call("GET", f"/operations/{operation['id']}") == operation


async def test_a_skipped_seq_id_is_not_waited_for(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        assert (await api.backward(model_id, 7))["status"] == "done"
        assert (await api.step(model_id, 3))["status"] == "done"


async def test_requests_keep_the_order_in_which_they_began(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        url = f"/api/v1/models/{model_id}/forward-backward-passes"
        begun = anyio.Event()
        replies: list[Any] = []

        async def slowly() -> Any:
            begun.set()
            yield b'{"payload": {"seq_id": 1, '
            await anyio.sleep(0.2)
            yield b'"forward_backward_input": {"loss_fn": "cross_entropy", "data": ['
            yield b'{"model_input": {"chunks": [{"tokens": [1, 2]}]}, '
            yield b'"loss_fn_inputs": {"target_tokens": [2, 3]}}]}}}'

        async def upload() -> None:
            replies.append((await api.http.post(url, content=slowly())).json())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload)
            await begun.wait()
            replies.append(await api.step(model_id))
        assert [reply["status"] for reply in replies] == ["done", "done"]


async def test_a_load_is_not_overtaken(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        saved = await api.result(await api.call("POST", f"/models/{model_id}/checkpoints", {}))
        await api.backward(model_id)
        begun = anyio.Event()
        replies: list[Any] = []

        async def slowly() -> Any:
            begun.set()
            yield b'{"path": '
            await anyio.sleep(0.2)
            yield f'"{saved["path"]}"}}'.encode()

        async def load() -> None:
            replies.append(
                (await api.http.post(f"/api/v1/models/{model_id}/load", content=slowly())).json()
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            await begun.wait()
            stepped = await api.step(model_id)
        assert replies[0]["status"] == "done"
        assert stepped["error_code"] == "no_gradients"  # loading had cleared them


async def test_samples_have_all_fields(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        await api.backward(model_id)
        await api.step(model_id)
        body = {
            "prompt": CHUNKS,
            "sampling_params": {"temperature": 1.0, "top_k": -1, "max_tokens": 3, "seed": 1},
            "num_samples": 4,
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 2,
            "return_old_logprob": True,
        }
        path = f"/sampling-sessions/{await api.sampler(model_id)}"
        result = (await api.call("POST", f"{path}/samples", body))["response"]["result"]
        assert len(result["sequences"]) == 4
        for sequence in result["sequences"]:
            assert len(sequence["tokens"]) == len(sequence["logprobs"]) > 0
            assert sequence["old_logprobs"] == sequence["logprobs"]
            assert sequence["text"] is not None
            assert sequence["weight_version"] == 1
        assert result["prompt_logprobs"][0] is None
        first, *others = result["topk_prompt_logprobs"]
        assert first is None and len(others) == len(result["prompt_logprobs"]) - 1
        for (_, likeliest), (_, second) in others:
            assert second <= likeliest < 0
        reply = await api.call("POST", f"{path}/logprobs", {"prompt": CHUNKS})
        assert reply["response"]["result"]["prompt_logprobs"] == result["prompt_logprobs"]
        described = await api.call("GET", path)
        assert described["base_model"] == "fake"
        await api.call("DELETE", path, status=204)


async def test_sampling_sessions_open_on_models_and_checkpoints(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        path = f"/models/{model_id}/checkpoints"
        saved = (await api.call("POST", path, {"name": "a"}))["response"]
        exports = f"/models/{model_id}/export-sampler"
        export = (await api.call("POST", exports, {"seq_id": 1, "path": "s"}))["response"]
        twin = (await api.call("POST", exports, {"seq_id": 2, "path": "s"}))["response"]
        assert twin["path"] != export["path"]  # an export never changes
        for source in (
            {"base_model": "fake"},
            {"model_path": saved["path"]},
            {"model_path": saved["id"]},
            {"model_path": export["model_path"], "base_model": "fake", "model_id": model_id},
        ):
            body = {"sampling_session_seq_id": 1, "base_model": None, "model_path": None, **source}
            opening = f"/sessions/{await api.session()}/sampling-sessions"
            session = await api.call("POST", opening, body, status=201)
            sampling = f"/sampling-sessions/{session['id']}/samples"
            assert (await api.call("POST", sampling, {"prompt": CHUNKS}))["status"] == "done"
        assert session["id"] == export["sampling_session_id"]


async def test_a_pause_holds_back_and_aborts(home: Path) -> None:
    slow_step = 0.02

    def slow(name: str, argument: object) -> None:
        if name == "step":
            time.sleep(slow_step)

    async with rest(home, FakeEngine(hook=slow)) as api:
        path = f"/sampling-sessions/{await api.sampler(await api.model())}"
        long = {"prompt": CHUNKS, "num_samples": 2, "sampling_params": {"max_tokens": 2000}}
        running = await api.call("POST", f"{path}/samples", long)
        assert running["status"] == "pending"
        paused = await api.call("POST", f"{path}/pause-generation", {"mode": "abort"})
        assert paused == {"ok": True, "status": "paused", "mode": "abort"}
        aborted = (await api.result(running))["result"]["sequences"]
        assert [sequence["stop_reason"] for sequence in aborted] == ["abort", "abort"]
        short = {"prompt": CHUNKS, "sampling_params": {"max_tokens": 1}}
        held = await api.call("POST", f"{path}/samples", short)
        assert held["status"] == "pending"
        await api.call("POST", f"{path}/continue-generation")
        assert len((await api.result(held))["result"]["sequences"]) == 1


async def test_checkpoints_are_saved_loaded_listed_and_expire(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        path = f"/models/{model_id}/checkpoints"
        body = {"type": "weight_and_optimizer", "name": "a", "ttl_seconds": None}
        saved = (await api.call("POST", path, body))["response"]
        assert saved["path"] == f"weaver://{model_id}/checkpoints/a"
        assert saved["id"] == str(uuid.UUID(saved["id"]))
        assert (saved["status"], saved["type"]) == ("completed", "weight_and_optimizer")
        [listed] = (await api.call("GET", path))["items"]
        assert listed == saved
        for reference in (saved["path"], saved["id"]):
            loading = {"path": reference, "include_optimizer": True}
            loaded = await api.call("POST", f"/models/{model_id}/load", loading)
            assert loaded["response"]["checkpoint"]["id"] == saved["id"]
        expiring = {"path": saved["path"], "ttl_seconds": 60}
        assert (await api.call("PATCH", f"{path}/ttl", expiring))["ttl_seconds"] == 60
        sampling = await api.call("POST", path, {"type": "sampling", "ttl_seconds": 9})
        assert sampling["response"]["type"] == "sampling"
        run = await api.call("GET", f"/training-runs/{model_id}")
        assert len(run["checkpoints"]) == 2
        taken = await api.call("POST", path, {"name": "a"})
        assert taken["error_code"] == "name_taken"


async def test_an_adapter_is_exported_as_a_whole_model(home: Path) -> None:
    merging = {"format": "huggingface", "merge_adapter": True}

    async def files(api: Rest, artifact: dict[str, Any]) -> set[str]:
        reply = await api.call("GET", f"/artifacts/{artifact['id']}/download")
        for file in reply["files"]:
            content = (await api.http.get(file["url"])).content
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
        return {file["name"] for file in reply["files"]}

    async with rest(home) as api:
        model_id = await api.model()
        made = await api.result(await api.call("POST", f"/models/{model_id}/export-hf", merging))
        assert made["kind"] == "hf_model" and made["uri"].endswith("/artifacts/hf_model")
        assert await files(api, made) == {"model.npy", "README.md"}
        listed = await api.call("GET", f"/checkpoints/{made['checkpoint_id']}/artifacts")
        assert listed["items"] == [made]
        plain = await api.result(await api.call("POST", f"/models/{model_id}/export-hf", {}))
        checkpoint = f"/checkpoints/{plain['checkpoint_id']}"
        both = [plain, await api.call("POST", f"{checkpoint}/export", merging)]
        assert (await api.call("GET", f"{checkpoint}/artifacts"))["items"] == both
        assert [await files(api, one) for one in both] == [
            {"weight.npy", "state.json"},
            {"model.npy", "README.md"},
        ]


async def test_artifacts_are_downloaded_in_pieces(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        exporting = {"format": "huggingface", "merge_adapter": False, "ttl_seconds": 60}
        operation = await api.call("POST", f"/models/{model_id}/export-hf", exporting)
        artifact = await api.result(operation)
        assert (artifact["kind"], artifact["status"]) == ("hf_adapter", "completed")
        checkpoint = f"/checkpoints/{artifact['checkpoint_id']}"
        assert await api.call("POST", f"{checkpoint}/export", exporting) == artifact
        assert (await api.call("GET", f"{checkpoint}/artifacts"))["items"] == [artifact]
        files = (await api.call("GET", f"/artifacts/{artifact['id']}/download"))["files"]
        for file in files:
            whole = (await api.http.get(file["url"])).content
            assert len(whole) == file["size"]
            assert hashlib.sha256(whole).hexdigest() == file["sha256"]
            rest_of_it = await api.http.get(file["url"], headers={"Range": "bytes=10-"})
            assert (rest_of_it.status_code, rest_of_it.content) == (206, whole[10:])
            beyond = await api.http.get(file["url"], headers={"Range": f"bytes={len(whole)}-"})
            assert beyond.status_code == 416


async def test_a_download_needs_no_key_but_its_own_address(home: Path) -> None:
    async with running(home, auth=True) as server:
        async with server.http(server.keys.create("a")[1]) as http:
            body = {"model_seq_id": 1, "base_model": "fake"}
            made = await http.post(f"/api/v1/sessions/{uuid.uuid4()}/models", json=body)
            artifact = await http.post(f"/api/v1/models/{made.json()['id']}/export-hf", json={})
            artifact_id = artifact.json()["response"]["id"]
            files = (await http.get(f"/api/v1/artifacts/{artifact_id}/download")).json()["files"]
        url = files[0]["url"]
        async with server.http() as stranger:
            assert (await stranger.get(url)).status_code == 200
            for forged in (url.replace("downloads/", "downloads/x"), f"{url}x", url[:-9] + "x"):
                assert (await stranger.get(forged)).status_code in (403, 404)
            other = url.rsplit("/", 1)[0] + "/manifest.json"
            assert (await stranger.get(other)).status_code == 404


async def test_metrics_are_kept(home: Path) -> None:
    async with rest(home) as api:
        model_id = await api.model()
        point = {
            "model_id": model_id,
            "name": "reward",
            "value": 0.5,
            "step": 3,
            "occurred_at": "2026-01-02T03:04:05+00:00",
            "labels": {},
        }
        path = f"/sessions/{await api.session()}/metrics"
        await api.call("POST", path, {"metrics": [point]}, status=202)
        [kept] = (await api.http.get(f"/v1/runs/{model_id}/metrics")).json()
        assert (kept["name"], kept["value"], kept["step"]) == ("reward", 0.5, 3)


async def test_many_wait_at_once(home: Path) -> None:
    async with rest(home) as api:
        path = f"/sampling-sessions/{await api.sampler(await api.model())}/samples"
        body = {"prompt": CHUNKS, "sampling_params": {"max_tokens": 4}}
        replies: list[Any] = []

        async def sample() -> None:
            replies.append(await api.result(await api.call("POST", path, body)))

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(sample)
        assert len(replies) == 100
