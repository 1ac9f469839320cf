"""Tinker's protocol over a fake engine: what requests become, and what is answered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest

from tests.fake_engine import FakeEngine
from tests.server.adapters.tinker import PROMPT, Tinker, passing, tinker
from weaver import protocol, types
from weaver.errors import StorageError
from weaver.server.adapters.tinker import answers, bodies, messages, passes
from weaver.server.adapters.tinker.session import Future, Note
from weaver.server.journal import Journal
from weaver.tensors import TensorData

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Tinker]:
    async with tinker(tmp_path) as client:
        yield client


def of(result: protocol.Result) -> Future:
    outcome = protocol.Outcome(submission_id="s", cursor=1, result=result)
    return Future("s", Note(), outcome)


# --- bytes, as the published client writes and reads them -----------------------------------------

SAMPLED = "0a14120805000000020000001a08000000bf000080bf"
PASSED = (
    "0a0b41727261795265636f726412470a0b41727261795265636f726412360a086c6f6770726f6273122a0a0c000000bf"
    "000080bf000000c01218000000000000000008000000000000000c00000000000000180118021a130a086c6f73733a"
    "73756d11000000000000f83f"
)
REQUESTED = (
    "0a09733a747261696e3a3010011a540a0c0a0a0a08050000000600000012280a0d7461726765745f746f6b656e7312"
    "170a10060000000000000002000000000000001802220102121a0a077765696768747312"
    "0f0a08000000000000803f1801220102220d63726f73735f656e74726f7079"
)


def test_a_sample_is_written_as_the_client_reads_it() -> None:
    sequence = types.SampledSequence(
        tokens=(5, 2),
        text="",
        logprobs=(-0.5, -1.0),
        sampling_logprobs=(-0.5, -1.0),
        stop_reason="stop",
    )
    sampled = protocol.Sampled(output=types.SampleResult(sequences=(sequence,)))
    answer = answers.future_answer(of(sampled), binary=True)
    assert bytes(answer.body).hex() == SAMPLED
    assert answer.headers["Content-Type"] == messages.MEDIA_TYPE


def test_a_pass_is_written_as_the_client_reads_it() -> None:
    outputs = [{"logprobs": TensorData([-0.5, -1.0])}, {"logprobs": TensorData([-2.0])}]
    output = types.ForwardBackwardResult(
        loss_fn_outputs=tuple(outputs), metrics={"loss": 0.5, "loss_sum": 1.5}
    )
    answer = answers.future_answer(of(protocol.GradientsDone(output=output)), binary=True)
    assert bytes(answer.body).hex() == PASSED


def test_a_pass_is_read_as_the_client_writes_it() -> None:
    given = passes._proto_pass(bytes.fromhex(REQUESTED))
    assert (given.model_id, given.seq_id, given.loss_fn) == ("s:train:0", 1, "cross_entropy")
    (datum,) = given.operation.datums
    assert datum.model_input.to_ints() == [5, 6]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 2]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1]
    assert given.operation.loss_fn_config == {"reduction": "sum"}


def test_the_description_is_that_of_the_source() -> None:
    """Nobody forgets `make proto`."""
    source = Path(messages.__file__).with_name("tinker.proto").read_text()
    written: set[tuple[str, str, int]] = set()
    message = ""
    for line in source.splitlines():
        opened = re.match(r"(message|enum) (\w+)", line)
        message = opened[2] if opened else message
        field = re.match(r"\s+[\w<>, ]*?(\w+) = (\d+);", line)
        if field is not None:
            written.add((message, field[1], int(field[2])))
    compiled: set[tuple[str, str, int]] = set()
    for file in messages._FILES.file:
        for one in file.message_type:
            compiled |= {(one.name, field.name, field.number) for field in one.field}
        for one in file.enum_type:
            compiled |= {(one.name, value.name, value.number) for value in one.value}
    assert written == compiled


# --- a model's life -------------------------------------------------------------------------------


async def test_a_model_is_trained_saved_sampled_and_resumed(api: Tinker) -> None:
    model_id = await api.model()
    session_id = model_id.partition(":")[0]
    assert model_id == f"{session_id}:train:0"
    info = await api.call("get_info", {"model_id": model_id})
    assert (info["model_name"], info["is_lora"], info["lora_rank"]) == ("fake", True, 2)

    passed = await api.binary(await api.backward(model_id, 1, datums=2))
    message = messages.ForwardBackwardOutput.FromString(passed)
    (record,) = message.loss_fn_outputs
    assert record.num_datums == 2
    assert len(np.frombuffer(record.fields["logprobs"].data, "<f4")) == 6
    assert np.frombuffer(record.fields["logprobs"].offsets, "<i8").tolist() == [0, 12, 24]
    assert "loss:sum" in message.metrics
    assert all(name.count(":") == 1 for name in message.metrics)
    stepped = await api.result(await api.step(model_id, 2))
    assert stepped["metrics"]["step"] == 1

    body = {"model_id": model_id, "path": "a", "seq_id": 3}
    saved = await api.result(await api.call("save_weights", body))
    assert saved == {"path": f"tinker://{model_id}/weights/a", "type": "save_weights"}
    ephemeral = {"model_id": model_id, "sampling_session_seq_id": 0, "seq_id": 4}
    opened = await api.result(await api.call("save_weights_for_sampler", ephemeral))
    assert opened["sampling_session_id"] == f"{session_id}:sample:0"
    named = {"model_id": model_id, "path": "b", "seq_id": 5}
    kept = await api.result(await api.call("save_weights_for_sampler", named))
    assert kept["path"] == f"tinker://{model_id}/sampler_weights/b"

    future = await api.sample(opened["sampling_session_id"], num_samples=2, prompt_logprobs=True)
    assert future["sample_sequence_ids"] == [f"{session_id}:sample:0:0:{i}" for i in (0, 1)]
    sampled = messages.SampleResponse.FromString(await api.binary(future))
    assert len(sampled.sequences) == 2
    for sequence in sampled.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) > 0
    prompt = np.frombuffer(sampled.prompt_logprobs, "<f4")
    assert len(prompt) == 3 and np.isnan(prompt[0]) and np.isfinite(prompt[1:]).all()

    opening = {"session_id": session_id, "sampling_session_seq_id": 7, "model_path": kept["path"]}
    assert await api.call("create_sampling_session", opening) == {
        "sampling_session_id": f"{session_id}:sample:7",
        "type": "create_sampling_session",
    }
    sampler = await api.get(f"samplers/{session_id}:sample:7")
    assert (sampler["base_model"], sampler["model_path"]) == ("fake", kept["path"])

    loading = {
        "session_id": session_id,
        "model_seq_id": 1,
        "path": saved["path"],
        "optimizer": True,
    }
    loaded = await api.result(await api.call("load_weights", loading))
    assert loaded["model_id"] == f"{session_id}:train:1"
    again = await api.result(await api.backward(loaded["model_id"], 1))
    assert "loss:sum" in again["metrics"]
    assert (await api.result(await api.step(loaded["model_id"], 2)))["metrics"]["step"] == 2

    runs = await api.get("training_runs")
    assert {run["training_run_id"] for run in runs["training_runs"]} == {
        f"{session_id}:train:0",
        f"{session_id}:train:1",
    }
    run = await api.get(f"training_runs/{model_id}")
    assert run["last_checkpoint"]["tinker_path"] == saved["path"]
    assert run["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/b"
    shown = await api.get(f"sessions/{session_id}")
    assert shown["sampler_ids"] == [f"{session_id}:sample:0", f"{session_id}:sample:7"]
    assert shown["user_metadata"] == {"who": "me"}
    weights = await api.call("weights_info", {"tinker_path": saved["path"]})
    assert (weights["base_model"], weights["lora_rank"]) == ("fake", 2)


async def test_checkpoints_are_listed_limited_and_deleted(api: Tinker) -> None:
    model_id = await api.model()
    for seq_id, name in enumerate(("a", "b"), start=1):
        body = {"model_id": model_id, "path": name, "seq_id": seq_id, "ttl_seconds": 3600}
        await api.result(await api.call("save_weights", body))
    of_run = f"training_runs/{model_id}/checkpoints"
    assert len((await api.get(of_run))["checkpoints"]) == 2
    assert (await api.get("checkpoints?limit=1"))["cursor"] == {
        "offset": 0,
        "limit": 1,
        "total_count": 2,
    }
    await api.call(f"{of_run}/weights/a/ttl", {"ttl_seconds": None}, method="PUT", status=204)
    await api.call(f"{of_run}/weights/b", method="DELETE", status=204)
    (left,) = (await api.get(of_run))["checkpoints"]
    assert (left["checkpoint_id"], left["expires_at"]) == ("weights/a", None)
    used = await api.get("billing/usage/checkpoints/current?project_id=default")
    (mine,) = used["data"]
    assert (mine["checkpoint_count"], mine["size_bytes"]) == (1, left["size_bytes"])
    assert (await api.get("billing/usage/checkpoints/current?project_id=x"))["data"] == []
    taken = {"model_id": model_id, "path": "a", "seq_id": 3}
    refused = await api.result(await api.call("save_weights", taken))
    assert refused["category"] == "user" and "a" in refused["error"]


# --- order, resends, failures ---------------------------------------------------------------------


async def test_requests_run_by_their_number_however_they_come(api: Tinker) -> None:
    model_id = await api.model()
    step = await api.step(model_id, 3)
    second = await api.backward(model_id, 2)
    first = await api.backward(model_id, 1)
    for future in (first, second):
        assert "loss:sum" in (await api.result(future))["metrics"]
    assert (await api.result(step))["metrics"]["step"] == 1


async def test_a_resend_gets_the_first_answer_and_another_body_is_refused(api: Tinker) -> None:
    model_id = await api.model()
    first = await api.backward(model_id, 1)
    assert await api.backward(model_id, 1) == first
    assert (await api.result(first)) == (await api.result(first))
    wrong = await api.backward(model_id, 1, tokens=[3, 2, 1], status=400)
    assert "another body" in wrong["detail"]
    assert (await api.result(await api.step(model_id, 2)))["metrics"]["step"] == 1
    session_id = model_id.partition(":")[0]
    assert await api.model(session_id) == model_id


async def test_a_failed_request_takes_its_place_and_the_model_goes_on(api: Tinker) -> None:
    model_id = await api.model()
    failed = await api.result(await api.backward(model_id, 1, loss_fn="ppo"))
    assert failed["category"] == "user" and "logprobs" in failed["error"]
    await api.result(await api.step(model_id, 2))  # its batch lacks a part
    await api.result(await api.backward(model_id, 3))
    assert (await api.result(await api.step(model_id, 4)))["metrics"]["step"] == 1
    skipped = await api.result(await api.step(model_id, 5))
    assert skipped["metrics"] == {"skipped:sum": 1.0}


async def test_a_future_is_held_and_then_answers_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LONGEST_POLL_S", 0.05)
    async with tinker(tmp_path) as api:
        model_id = await api.model()
        waiting = await api.step(model_id, 2)  # the first never comes
        held = await api.call("retrieve_future", {"request_id": waiting["request_id"]}, status=408)
        assert held == {"queue_state": "active"}


async def test_a_sampling_session_is_polled_as_a_whole(api: Tinker) -> None:
    session_id = await api.session()
    called = f"{session_id}:sample:0"
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fake"}
    await api.call("create_sampling_session", body)
    futures = [await api.sample(called, seq_id) for seq_id in range(3)]
    bad = await api.sample(called, 3, sampling_params={"max_tokens": 10**6})
    cursor, states = 0, {}
    with anyio.fail_after(10):
        while len(states) < 4:
            asked = {"target": {"sampling_session_id": called}, "prev_cursor": cursor}
            answer = await api.call("retrieve_futures", asked)
            cursor = answer["cursor"]
            states |= {one["request_id"]: one["state"] for one in answer["completions"]}
    assert states == {
        **{one["request_id"]: "finished" for one in futures},
        bad["request_id"]: "failed",
    }


async def test_weights_in_flight_are_those_of_the_last_save(api: Tinker) -> None:
    model_id = await api.model()
    session_id = model_id.partition(":")[0]

    async def publish(number: int, seq_id: int, kind: str) -> str:
        body = {"model_id": model_id, "sampling_session_seq_id": number, "seq_id": seq_id}
        future = await api.call("save_weights_for_sampler", {**body, "kind": kind})
        return str((await api.result(future))["sampling_session_id"])

    async def scored(called: str, seq_id: int) -> bytes:
        future = await api.sample(called, seq_id, prompt_logprobs=True)
        again = await api.sample(called, seq_id, prompt_logprobs=True)
        assert future == again
        sampled = messages.SampleResponse.FromString(await api.binary(future))
        return bytes(sampled.prompt_logprobs)

    kept, flying = await publish(0, 1, "snapshot"), await publish(1, 2, "inflight")
    assert flying == f"{session_id}:sample:1"
    before = await scored(kept, 1)
    assert await scored(flying, 1) == before
    early = await api.sample(flying, 7, prompt_logprobs=True)
    await api.result(await api.backward(model_id, 3))
    await api.result(await api.step(model_id, 4))
    later = await publish(2, 5, "inflight")
    assert await scored(kept, 2) == before
    after = await scored(later, 2)
    assert after != before
    assert await scored(flying, 2) == after
    assert await api.sample(flying, 7, prompt_logprobs=True) == early  # a resend, of older weights


async def test_a_name_that_cannot_be_written_down_is_given_when_it_can(
    api: Tinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await api.model()
    body = {"model_id": model_id, "sampling_session_seq_id": 0, "seq_id": 1}
    opened = await api.call("save_weights_for_sampler", body)

    async def full(*args: object) -> None:
        raise StorageError("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "name", full)
        assert (await api.result(opened))["category"] == "server"
    written, write = [], Journal.name

    async def note(self: Journal, session_id: str, name: str, value: str) -> None:
        await write(self, session_id, name, value)
        written.append(name)

    monkeypatch.setattr(Journal, "name", note)
    called = (await api.result(opened))["sampling_session_id"]
    assert written == [called]
    assert (await api.get(f"samplers/{called}"))["base_model"] == "fake"


async def test_outcomes_are_forgotten_once_they_were_answered(
    api: Tinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await api.model()
    first = await api.backward(model_id, 1)
    monkeypatch.setattr("weaver.server.adapters.tinker.session.KEPT_S", -1.0)
    await api.result(first)
    await api.call("retrieve_future", {"request_id": first["request_id"]}, status=404)


# --- what the protocol means by it ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_fn", "native", "config"),
    [
        ("importance_sampling", "importance_sampling", {}),
        ("gspo", "gspo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("stable_reinforce", "importance_sampling", {"ratio_cap": 1.0, "kl_coef": 0.1}),
    ],
)
def test_losses_have_the_options_of_this_protocol(
    loss_fn: str, native: str, config: dict[str, float]
) -> None:
    options = {"kl_coeff": 0.1} if loss_fn == "stable_reinforce" else {}
    inputs = {"logprobs": [-1.0] * 3, "advantages": [1.0] * 3}
    if loss_fn == "gspo":
        inputs["sequence_ratio_mask"] = [0.0, 1.0, 1.0]
    given = passes._proto_pass(passing("m", 1, loss_fn=loss_fn, inputs=inputs, **options))
    assert given.operation.loss_fn == native
    assert given.operation.loss_fn_config == {**config, "reduction": "sum"}
    (datum,) = given.operation.datums
    assert ("weights" in datum.loss_fn_inputs) == (loss_fn == "gspo")


@pytest.mark.parametrize(
    ("stop", "strings", "ids", "ignored"),
    [
        (None, (), (), False),
        ([], (), (), True),
        ("end", ("end",), (), True),
        (["a", "b"], ("a", "b"), (), True),
        ([3, 4], (), (3, 4), True),
    ],
)
def test_stops_replace_the_models_own(
    stop: Any, strings: tuple[str, ...], ids: tuple[int, ...], ignored: bool
) -> None:
    params = bodies.Params(stop=stop).native(room=9)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (strings, ids, ignored)
    assert params.max_tokens == 9


def several(model_id: str, shape: tuple[int, int], **inputs: dict[str, Any]) -> bytes:
    """A pass whose inputs are [N, K], sparse where they have row pointers."""
    request = messages.ForwardBackwardRequest.FromString(passing(model_id, 1))
    for name, given in inputs.items():
        tensor = request.data[0].loss_fn_inputs[name]
        whole = name == "target_tokens"
        values = np.array(given["data"], "<i8" if whole else "<f4").tobytes()
        if "crow" in given:
            tensor.sparse_csr.values = values
            tensor.sparse_csr.crow_indices = np.array(given["crow"], "<i8").tobytes()
            tensor.sparse_csr.col_indices = np.array(given["col"], "<i8").tobytes()
        else:
            tensor.dense = values
        tensor.dtype = messages.INT64 if whole else messages.FLOAT32
        del tensor.shape[:]
        tensor.shape.extend(shape)
    return bytes(request.SerializeToString())


async def test_a_position_may_have_several_targets_dense_or_sparse(api: Tinker) -> None:
    dense = {
        "target_tokens": {"data": [5, 0, 0, 6, 7, 8]},
        "weights": {"data": [0.5, 0, 0, 0, 0.25, 0.25]},
    }
    sparse = {
        "target_tokens": {"data": [5, 6, 7, 8], "crow": [0, 1, 2, 4], "col": [0, 1, 0, 1]},
        "weights": {"data": [0.5, 0.25, 0.25], "crow": [0, 1, 1, 3], "col": [0, 0, 1]},
    }
    made = [
        passes._proto_pass(several("m", (3, 2), **given)).operation for given in (dense, sparse)
    ]
    assert made[0] == made[1]
    inputs = made[0].datums[0].loss_fn_inputs
    assert inputs["target_tokens"].tolist() == [[5, 0], [0, 6], [7, 8]]

    model_id = await api.model()
    content = several(model_id, (3, 2), **sparse)
    headers = {"Content-Type": messages.MEDIA_TYPE}
    reply = await api.http.post("/api/v1/forward_backward", content=content, headers=headers)
    assert reply.status_code == 200, reply.text
    passed = messages.ForwardBackwardOutput.FromString(await api.binary(reply.json()))
    batch = passed.loss_fn_outputs[0].fields["logprobs"]
    lp = np.frombuffer(batch.data, "<f4").reshape(3, 2)
    assert list(batch.trailing_shape) == [2]
    weights = inputs["weights"].to_numpy()
    assert passed.metrics["loss:sum"] == pytest.approx(-(lp * weights).sum(), rel=1e-5)

    tensors = {
        "target_tokens": {"data": [5, 0, 0, 6, 7, 8], "dtype": "int64", "shape": [3, 2]},
        "weights": {
            "data": [0.5, 0.25, 0.25],
            "dtype": "float32",
            "shape": [3, 2],
            "sparse_crow_indices": [0, 1, 1, 3],
            "sparse_col_indices": [0, 0, 1],
        },
    }
    datum = {"model_input": PROMPT, "loss_fn_inputs": tensors}
    body = {
        "model_id": model_id,
        "seq_id": 2,
        "forward_input": {"data": [datum], "loss_fn": "cross_entropy"},
    }
    told = await api.result(await api.call("forward", body))
    assert told["loss_fn_outputs"][0]["logprobs"]["shape"] == [3, 2]
    np.testing.assert_allclose(
        told["loss_fn_outputs"][0]["logprobs"]["data"], lp.ravel(), rtol=1e-6
    )


def test_passes_of_different_widths_have_a_record_each() -> None:
    shapes = [(2,), (3,), (2, 2), (1, 2), (2, 1), (1,)]
    outputs = [{"logprobs": TensorData(np.full(shape, -1.0))} for shape in shapes]
    output = types.ForwardBackwardResult(loss_fn_outputs=tuple(outputs), metrics={"loss_sum": 1.5})
    answer = answers.future_answer(of(protocol.GradientsDone(output=output)), binary=True)
    records = messages.ForwardBackwardOutput.FromString(bytes(answer.body)).loss_fn_outputs
    assert [r.num_datums for r in records] == [2, 2, 1, 1]
    assert [list(r.fields["logprobs"].trailing_shape) for r in records] == [[], [2], [1], []]


async def test_a_prompt_is_scored_at_each_place(api: Tinker) -> None:
    session_id = await api.session()
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fake"}
    called = (await api.call("create_sampling_session", body))["sampling_session_id"]
    given = {"prompt_logprobs": True, "topk_prompt_logprobs": 4, "topk_sample_logprobs": 2}
    dense = {"data": [2, 50, 3, -1], "dtype": "int64", "shape": [2, 2]}
    future = await api.sample(called, 0, **given, target_prompt_logprobs=dense)
    told = messages.SampleResponse.FromString(await api.binary(future))
    top = told.topk_prompt_logprobs
    assert (top.length, top.k) == (3, 4)
    ids = np.frombuffer(top.token_ids, "<i4").reshape(3, 4)
    logprobs = np.frombuffer(top.logprobs, "<f4").reshape(3, 4)
    assert ids[0].tolist() == [0] * 4 and logprobs[0].tolist() == [-99999.0] * 4
    assert (np.diff(logprobs[1:]) <= 0).all()
    prompt = np.frombuffer(told.prompt_logprobs, "<f4")
    targets = np.frombuffer(told.target_prompt_logprobs.dense, "<f4").reshape(2, 2)
    assert list(told.target_prompt_logprobs.shape) == [2, 2] and targets[1, 1] == 0
    np.testing.assert_allclose(targets[:, 0], prompt[1:], rtol=1e-6)  # the prompt is 1, 2, 3
    (sequence,) = told.sequences
    of_sample = sequence.topk_sampled_logprobs
    assert (of_sample.length, of_sample.k) == (len(sequence.tokens) // 4, 2)

    sparse = {**dense, "data": [2, 50, 3], "sparse_crow_indices": [0, 2, 3]}
    sparse["sparse_col_indices"] = [0, 1, 0]
    future = await api.sample(called, 1, target_prompt_logprobs=sparse)
    told = messages.SampleResponse.FromString(await api.binary(future))
    assert not told.HasField("topk_prompt_logprobs") and not told.prompt_logprobs
    csr = told.target_prompt_logprobs.sparse_csr
    assert np.frombuffer(csr.crow_indices, "<i8").tolist() == [0, 2, 3]
    assert np.frombuffer(csr.col_indices, "<i8").tolist() == [0, 1, 0]
    values = np.frombuffer(csr.values, "<f4")
    np.testing.assert_array_equal(values, [*targets[0], targets[1, 0]])

    future = await api.sample(called, 3, **given, prompt_logprobs_last_n=1)
    told = messages.SampleResponse.FromString(await api.binary(future))
    last = np.frombuffer(told.prompt_logprobs, "<f4")
    assert np.isnan(last).tolist() == [True, True, False] and last[2] == prompt[2]
    rows = np.frombuffer(told.topk_prompt_logprobs.logprobs, "<f4").reshape(3, 4)
    assert (rows[:2] == -99999).all() and (rows[2] == logprobs[2]).all()

    future = await api.sample(called, 2, topk_prompt_logprobs=1)
    told = await api.result(future)
    assert told["topk_prompt_logprobs"][0] is None and len(told["topk_prompt_logprobs"][1]) == 1


async def test_the_likeliest_tokens_are_tempered_as_what_was_drawn(api: Tinker) -> None:
    session_id = await api.session()
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fake"}
    called = (await api.call("create_sampling_session", body))["sampling_session_id"]
    for seq_id, temperature in enumerate((1.0, 0.5)):
        params = {"max_tokens": 6, "seed": 1, "temperature": temperature}
        given = {"topk_sample_logprobs": 256, "sampling_params": params}
        future = await api.sample(called, seq_id, **given)
        told = messages.SampleResponse.FromString(await api.binary(future))
        (sequence,) = told.sequences
        top = sequence.topk_sampled_logprobs
        p = np.exp(np.frombuffer(top.logprobs, "<f4").reshape(-1, 256))
        assert 0.99 < p.sum(1).min() <= p.sum(1).max() < 1.00001  # the fake has 257
        ids = np.frombuffer(top.token_ids, "<i4").reshape(-1, 256)
        drawn = np.frombuffer(sequence.tokens, "<i4")
        lp = np.frombuffer(sequence.logprobs, "<f4")
        at = (ids == drawn[:, None]).argmax(1)
        np.testing.assert_allclose(np.log(p[np.arange(len(p)), at]), lp, atol=1e-5)


async def test_clients_before_protobuf_send_and_read_json(api: Tinker) -> None:
    model_id = await api.model()
    targets = {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}
    datum = {"model_input": PROMPT, "loss_fn_inputs": {"target_tokens": targets}}
    given = {"data": [datum], "loss_fn": "cross_entropy"}
    body = {"model_id": model_id, "seq_id": 1, "forward_backward_input": given}
    passed = await api.result(await api.call("forward_backward", body))
    assert passed["loss_fn_outputs"][0]["logprobs"]["shape"] == [3]
    body = {"model_id": model_id, "seq_id": 2, "forward_input": given}
    assert (await api.result(await api.call("forward", body)))["metrics"]["num_tokens:sum"] == 3


async def test_a_pass_without_gradient_changes_nothing(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with tinker(tmp_path, engine) as api:
        model_id = await api.model()
        await api.result(await api.backward(model_id, 1, forward_only=True))
        skipped = await api.result(await api.step(model_id, 2))
        assert skipped["metrics"] == {"skipped:sum": 1.0}
