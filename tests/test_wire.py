"""The binary message: exact round trips of every operation and result, and hostile input."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, timedelta, timezone
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from weaver import protocol, types, wire
from weaver.errors import InvalidRequestError, TooLargeError, WeaverError
from weaver.tensors import TensorData

SUBMISSIONS = TypeAdapter(tuple[protocol.Submission, ...])
OUTCOMES = TypeAdapter(tuple[protocol.Outcome, ...])
ANY: TypeAdapter[Any] = TypeAdapter(Any)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = text.map(lambda name: name.replace("\0", "-"))
finite = st.floats(allow_nan=False, allow_infinity=False)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
token_ids = st.lists(st.integers(0, 2**31 + 5), max_size=40).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(text, inner, max_size=4),
    max_leaves=30,
)
metadata = st.dictionaries(text | st.just("$tensor"), json_values, max_size=3)
tensors = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30).map(
        lambda x: TensorData(np.array(x, np.int64))
    ),
    st.lists(st.floats(width=32), max_size=30).map(lambda x: TensorData(np.array(x, np.float32))),
    st.sampled_from([(), (0, 3), (2, 1, 2)]).map(lambda shape: TensorData(np.ones(shape))),
)
prompts = st.one_of(
    token_ids.map(types.ModelInput.from_ints),
    text,
    st.lists(st.builds(types.Message, role=text, content=text), max_size=3).map(tuple),
)
loras = st.builds(types.LoraConfig, rank=st.integers(1, 64), seed=st.none() | st.integers(0, 9))
times = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]))
datums = st.builds(
    types.Datum,
    model_input=token_ids,
    loss_fn_inputs=st.fixed_dictionaries(
        {"target_tokens": token_ids}, optional={"$list": st.lists(float32s, max_size=20)}
    ),
)
operations = st.one_of(
    st.builds(protocol.CreateModel, base_model=text, lora_config=loras, user_metadata=metadata),
    st.builds(
        protocol.ForwardBackward,
        datums=st.lists(datums, max_size=3).map(tuple),
        loss_fn=text,
        loss_fn_config=st.dictionaries(text, finite | text, max_size=3),
        backward=st.booleans(),
    ),
    st.builds(protocol.OptimStep, params=st.just(types.AdamParams(learning_rate=0.1))),
    st.builds(protocol.SaveCheckpoint, purpose=st.just("state"), name=st.none() | text),
    st.builds(protocol.LoadCheckpoint, path=text),
    st.builds(protocol.OpenSampler, base_model=st.none() | text, model_path=st.none() | text),
    st.builds(
        protocol.Sample,
        sampler_id=text,
        prompt=prompts,
        params=st.builds(types.SamplingParams, stop=st.lists(text.filter(bool), max_size=2)),
    ),
)
submissions = st.builds(
    protocol.Submission,
    id=names,
    operation=st.none() | operations,
    run_id=st.none() | names,
    seq=st.none() | st.integers(1, 2**40),
)
sequences = st.builds(
    types.SampledSequence,
    tokens=token_ids,
    text=text,
    logprobs=st.lists(finite | float32s, max_size=40).map(tuple),
    sampling_logprobs=st.lists(float32s, min_size=16, max_size=40).map(tuple),
    stop_reason=st.sampled_from(["stop", "length"]),
)
checkpoints = st.builds(
    types.CheckpointInfo,
    path=text,
    run_id=text,
    name=text,
    kind=st.just("sampler"),
    base_model=text,
    training_mode=st.just("lora"),
    lora_config=loras,
    created_at=times,
    expires_at=st.none() | times,
)
runs = st.builds(
    types.TrainingRun,
    training_mode=st.just("full_ft"),
    lora_config=st.none(),
    status=st.just("idle"),
    created_at=times,
    last_request_at=times,
    user_metadata=metadata,
)
models = st.builds(types.ModelInfo, training_modes=st.just(("lora",)))
metrics = st.dictionaries(text, finite, max_size=3)
results = st.one_of(
    st.builds(protocol.ModelCreated, run=runs, model=models),
    st.builds(
        protocol.GradientsDone,
        output=st.builds(
            types.ForwardBackwardResult,
            loss_fn_outputs=st.lists(st.dictionaries(text, tensors, max_size=2), max_size=2).map(
                tuple
            ),
            metrics=metrics,
        ),
    ),
    st.builds(protocol.StepDone, output=st.builds(types.OptimStepResult, metrics=metrics)),
    st.builds(protocol.CheckpointSaved, checkpoint=checkpoints),
    st.builds(protocol.CheckpointLoaded, checkpoint=checkpoints),
    st.builds(protocol.SamplerOpened, model=models),
    st.builds(
        protocol.Sampled,
        output=st.builds(
            types.SampleResult,
            sequences=st.lists(sequences, max_size=2).map(tuple),
            prompt_tokens=token_ids,
            prompt_logprobs=st.none() | st.lists(st.none() | finite, max_size=40).map(tuple),
        ),
    ),
)
failures = st.builds(protocol.ErrorInfo, code=text, message=text, field=st.none() | text)
outcomes = st.builds(protocol.Outcome, result=st.none() | results, error=st.none() | failures)


@given(st.lists(submissions, max_size=4).map(tuple))
@settings(max_examples=150, deadline=None)
def test_submissions_come_back_equal(batch: tuple[protocol.Submission, ...]) -> None:
    assert wire.decode(wire.encode(batch), SUBMISSIONS) == batch


@given(st.lists(outcomes, max_size=3).map(tuple))
@settings(max_examples=150, deadline=None)
def test_outcomes_come_back_equal(batch: tuple[protocol.Outcome, ...]) -> None:
    assert wire.decode(wire.encode(batch), OUTCOMES) == batch


def test_files_come_back_equal() -> None:
    files = {"tokenizer.json": b"{}" * 1000, "empty": b"", "$odd": bytes(range(256))}
    assert wire.decode(wire.encode(files), TypeAdapter(dict[str, bytes])) == files


def test_floats_that_float32_cannot_hold_stay_float64() -> None:
    logprobs = tuple(0.1 * i for i in range(20))
    sequence = types.SampledSequence(
        tokens=(), text="", logprobs=logprobs, sampling_logprobs=(-0.5,) * 20, stop_reason="stop"
    )
    back = wire.decode(wire.encode(sequence), TypeAdapter(types.SampledSequence))
    assert back.logprobs == logprobs
    assert b'["f8",[20],0]' in wire.encode(sequence)
    assert b'["f4",[20],160]' in wire.encode(sequence)


def batch_of(datums: int, tokens: int) -> tuple[protocol.Submission, ...]:
    """A batch for importance_sampling, the tokens drawn from a vocabulary of 150k."""
    rng = np.random.default_rng(0)
    batch = []
    for _ in range(datums):
        ids = rng.integers(0, 150_000, tokens + 1)
        inputs = {
            "target_tokens": ids[1:],
            "logprobs": np.log(rng.uniform(0.01, 1, tokens)).astype(np.float32),
            "advantages": np.full(tokens, rng.normal(), np.float32),
        }
        batch.append(types.Datum(model_input=ids[:-1], loss_fn_inputs=inputs))
    operation = protocol.ForwardBackward(datums=tuple(batch), loss_fn="importance_sampling")
    return (protocol.Submission(id="a", run_id="r", seq=1, operation=operation),)


def test_a_training_batch_takes_at_most_8_bytes_a_token() -> None:
    batch = batch_of(16, 4096)
    message = wire.encode(batch)
    assert len(message) / (16 * 4096) <= 8
    assert wire.decode(message, SUBMISSIONS) == batch


@pytest.mark.parametrize(
    "value", [b"x", {1, 2}, float("nan"), float("inf"), "\ud800", object(), {1: "a"}, 1j]
)
def test_metadata_that_json_cannot_hold_is_refused(value: object) -> None:
    operation = protocol.CreateModel(base_model="m", user_metadata={"x": value})
    with pytest.raises(InvalidRequestError, match="metadata"):
        wire.encode(operation)


def test_metadata_without_an_end_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(InvalidRequestError, match="metadata"):
        wire.encode(protocol.CreateModel(base_model="m", user_metadata={"x": 1} | loop))


def message(header: object, raw: bytes = b"", *, frame: bytes | None = None) -> bytes:
    text_bytes = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = zstandard.compress(raw) if raw else b""
    lengths = len(text_bytes).to_bytes(4, "little") + len(raw).to_bytes(8, "little")
    return wire.MAGIC + lengths + text_bytes + (packed if frame is None else frame)


def bomb() -> bytes:
    frame = zstandard.compress(bytes(64 * 2**20))
    return wire.MAGIC + (2).to_bytes(4, "little") + (100).to_bytes(8, "little") + b"[]" + frame


def unsized(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(raw)


MALFORMED = {
    "empty": b"",
    "json": b'{"id": "a"}',
    "magic only": wire.MAGIC,
    "other version": b"WVR\x02" + bytes(20),
    "header cut": message([])[:-1],
    "not json": message(b"{"),
    "not utf-8": message(b'"\xff"'),
    "nan": message(b"[NaN]"),
    "deep": message(b"[" * 5000 + b"]" * 5000),
    "bomb": bomb(),
    "no frame": message([], b"abc", frame=b""),
    "garbage frame": message([], b"abc", frame=b"abcdefgh"),
    "frame without its size": message([], b"abc", frame=unsized(b"abc")),
    "frame cut": message({"$bytes": ["u1", [3], 0]}, b"abc")[:-1],
    "bytes behind the frame": message({"$bytes": ["u1", [3], 0]}, b"abc") + b"x",
    "frame for no arrays": message([], b"", frame=b"abc"),
    "unused bytes": message([], b"abc"),
    "unknown dtype": message({"$tensor": ["O", [1], 0]}, b"abcdefgh"),
    "tensor of bytes": message({"$tensor": ["u1", [3], 0]}, b"abc"),
    "bytes of ints": message({"$bytes": ["i4", [1], 0]}, b"abcd"),
    "list of two dimensions": message({"$list": ["i4", [1, 1], 0]}, b"abcd"),
    "beyond the end": message({"$list": ["i4", [2], 0]}, b"abcd"),
    "negative offset": message({"$list": ["i4", [1], -4]}, b"abcd"),
    "negative shape": message({"$list": ["i4", [-1], 0]}, b"abcd"),
    "huge shape": message({"$tensor": ["i4", [2**40, 2**40], 0]}, b"abcd"),
    "empty huge shape": message([{"$tensor": ["i4", [0, 2**47, 2**47], 0]}]),
    "twice the same bytes": message([{"$list": ["i4", [1], 0]}] * 2, b"abcd"),
    "too many dimensions": message({"$tensor": ["i4", [1] * 70, 0]}, b"abcd"),
    "shape of floats": message({"$tensor": ["i4", [1.0], 0]}, b"abcd"),
    "reference is a number": message({"$tensor": 3}, b"abcd"),
    "30,000 dimensions": message({"$list": ["i4", [2**63 - 1] * 30_000, 0]}),
    "30,000 empty dimensions": message({"$tensor": ["f8", [0] * 30_000, 0]}),
    "shape of truths": message({"$tensor": ["i4", [True], 0]}, b"abcd"),
    "shape of giants": message({"$tensor": ["i4", [10**4000] * 8, 0]}, b"abcd"),
    "offset of a giant": message({"$tensor": ["i4", [1], 10**4000]}, b"abcd"),
    "dtype of a million letters": message({"$tensor": ["i" * 10**6, [1], 0]}, b"abcd"),
    "bytes in a list": message([{"$bytes": ["u1", [3], 0]}], b"abc"),
    "bytes as text": message({"note": {"$bytes": ["u1", [3], 0]}, "x": 1}, b"abc"),
    "reserved key": message({"$other": 3}),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.decode(data, ANY)
    assert caught.value.code == "invalid_request"
    assert "Weaver message" in str(caught.value)


def test_a_bomb_allocates_nothing() -> None:
    data = bomb()
    tracemalloc.start()
    with pytest.raises(InvalidRequestError, match="length"):
        wire.decode(data, ANY)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "limits", [wire.WireLimits(header_bytes=10), wire.WireLimits(array_bytes=10)]
)
def test_the_limits_hold_before_parsing(limits: wire.WireLimits) -> None:
    with pytest.raises(TooLargeError, match="the limit is 10"):
        wire.decode(message({"$bytes": ["u1", [99], 0]}, bytes(99)), ANY, limits=limits)


def test_a_message_longer_than_its_parts_may_be_is_refused() -> None:
    limits = wire.WireLimits(header_bytes=100, array_bytes=100)
    with pytest.raises(TooLargeError, match="message"):
        wire.decode(message([], b"", frame=bytes(1000)), ANY, limits=limits)


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(WeaverError, match="top_p") as caught:
        wire.decode(
            message(
                [
                    {
                        "id": "a",
                        "operation": {
                            "kind": "sample",
                            "sampler_id": "s",
                            "prompt": "x",
                            "params": {"top_p": 3},
                        },
                    }
                ]
            ),
            SUBMISSIONS,
        )
    assert caught.value.code == "invalid_params"


@pytest.mark.parametrize(
    "header",
    [b"[" + b"[]," * 600_000, b"{}," * 600_000, b'"a",' * 600_000, b"1," * 4_300_000],
    ids=["lists", "mappings", "texts", "numbers"],
)
def test_json_that_would_take_long_to_parse_is_refused_before_it_is(header: bytes) -> None:
    with pytest.raises(TooLargeError, match="JSON"):
        wire.decode(message(header), ANY)


def test_what_inflates_too_much_is_refused_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = message([{"$list": ["f4", [2**23], 0]}], bytes(2**25))
    assert len(data) < 2000
    monkeypatch.setattr(wire, "decompress", pytest.fail)
    with pytest.raises(TooLargeError, match="limit is 1024"):
        wire.decode(data, ANY)


@pytest.mark.parametrize("megabytes", [1, 20])
def test_arrays_that_compress_well_are_sent_so_that_they_may_be_read(megabytes: int) -> None:
    tokens = megabytes * 2**18
    datum = types.Datum(
        model_input=np.ones(tokens, np.int64), loss_fn_inputs={"weights": np.ones(tokens)}
    )
    assert wire.decode(wire.encode(datum), TypeAdapter(types.Datum)) == datum


def test_numbers_in_lists_are_counted_before_they_are_made() -> None:
    data = wire.encode([types.ModelInput.from_ints(range(60)), types.ModelInput.from_ints([1])])
    inputs = TypeAdapter(tuple[types.ModelInput, ...])
    assert len(wire.decode(data, inputs, limits=wire.WireLimits(list_numbers=60))) == 2
    with pytest.raises(TooLargeError, match="numbers"):
        wire.decode(data, inputs, limits=wire.WireLimits(list_numbers=59))


def test_a_list_of_numbers_takes_no_memory_where_none_belongs() -> None:
    data = message([{"$list": ["f4", [2**21], 0]}], np.random.default_rng(0).bytes(2**23))
    tracemalloc.start()
    with pytest.raises(InvalidRequestError):
        wire.decode(data, SUBMISSIONS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * 2**23


def test_metadata_get_their_lists_back() -> None:
    operation = protocol.CreateModel(
        base_model="m", user_metadata={"a": list(range(30)), "b": {"c": [[0.5] * 20]}}
    )
    assert wire.decode(wire.encode(operation), TypeAdapter(protocol.CreateModel)) == operation


LIMITS = wire.WireLimits(header_bytes=2**16, array_bytes=2**16)
GOOD = wire.encode(batch_of(2, 40))


def survives(data: bytes) -> None:
    try:
        wire.decode(data, SUBMISSIONS, limits=LIMITS)
    except InvalidRequestError:
        pass


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_only_named_errors(data: bytes) -> None:
    survives(data)
    survives(wire.MAGIC + data)
    survives(message(data))
    survives(message([{"$tensor": ["i4", [len(data) // 4], 0]}], data))


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_mutations_raise_only_named_errors(data: st.DataObject) -> None:
    mutated = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip":
                mutated[at] = data.draw(st.integers(0, 255))
            case "cut":
                del mutated[max(at, 1) :]
            case "insert":
                mutated[at:at] = data.draw(st.binary(max_size=8))
            case "drop":
                del mutated[at : at + data.draw(st.integers(1, 8))]
        mutated = mutated or bytearray(b"x")
    survives(bytes(mutated))


def test_a_message_of_another_version_says_which() -> None:
    with pytest.raises(InvalidRequestError, match="version 2, and 1 is read here"):
        wire.decode(b"WVR\x02" + bytes(12) + b"[]", ANY)
