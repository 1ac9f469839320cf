"""The contract of `Service`: opening samplers, sampling, streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.contracts.conftest import open_local
from tests.fake_engine import FakeEngine
from weaver.errors import NotFoundError, OperationCancelledError
from weaver.protocol import (
    CheckpointSaved,
    ForwardBackward,
    GradientsDone,
    OpenSampler,
    ReleaseSampler,
    Sample,
    Sampled,
    SamplerOpened,
    SamplerReleased,
    SaveCheckpoint,
    StepDone,
)
from weaver.tensors import TensorData
from weaver.types import Datum, Message, ModelInput, SampleDelta, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from tests.contracts.conftest import ServiceOpener
    from weaver.protocol import Operation, Service
    from weaver.types import SampleResult

pytestmark = pytest.mark.anyio
SHORT = SamplingParams(max_tokens=8, temperature=0)
LONG = SamplingParams(max_tokens=60, temperature=1, seed=1)
STOP_257 = SamplingParams(max_tokens=8, stop_token_ids=[257])
BASE = "base:fake"
HI = ModelInput.from_ints(list(b"hi"))


async def sample(caller: Caller, sampler_id: str, **changes: object) -> SampleResult:
    operation = Sample(sampler_id=sampler_id, prompt=HI, params=SHORT).model_copy(update=changes)
    return (await caller.do(operation, Sampled)).output


async def train(caller: Caller, run: str, steps: int = 1) -> None:
    for _ in range(steps):
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)


async def test_a_base_model_is_sampled(caller: Caller) -> None:
    opened = await caller.do(OpenSampler(base_model="fake"), SamplerOpened)
    assert opened.model.name == "fake" and opened.weights_version == 0
    result = await sample(caller, opened.sampler_id, num_samples=3)
    assert result.prompt_tokens == tuple(b"hi") and result.prompt_logprobs is None
    for sequence in result.sequences:
        assert (
            len(sequence.tokens) == len(sequence.logprobs) == len(sequence.sampling_logprobs) == 8
        )
        assert sequence.stop_reason == "length" and sequence.text == bytes(sequence.tokens).decode()


async def test_text_and_chat_are_encoded_by_the_model(caller: Caller) -> None:
    assert (await sample(caller, BASE, prompt="hi")).prompt_tokens == tuple(b"hi")
    chat = (Message(role="user", content="x"),)
    result = await sample(caller, BASE, prompt=chat)
    assert bytes(result.prompt_tokens).decode() == "user: x\nassistant: "


async def test_a_prompt_is_scored_alone(caller: Caller) -> None:
    result = await sample(caller, BASE, num_samples=0, include_prompt_logprobs=True)
    assert result.sequences == () and result.prompt_logprobs is not None
    first, second = result.prompt_logprobs
    assert first is None and second is not None and second < 0


async def test_likeliest_tokens_and_targets_are_told_of_prompt_and_samples(caller: Caller) -> None:
    targets = np.array([[-1, 3, 5], [105, -1, 104]])
    asked = {"num_samples": 2, "top_logprobs": 4, "prompt_top_logprobs": 3}
    result = await sample(caller, BASE, **asked, prompt_targets=TensorData(targets))
    assert result.prompt_logprobs is None
    top, scores = result.prompt_top_logprobs, result.prompt_target_logprobs
    assert top is not None and scores is not None
    assert top.tokens.tolist()[0] == [-1] * 3 and np.isnan(top.logprobs[0]).all()
    assert scores.dtype == top.logprobs.dtype == "float32"
    assert np.isnan(scores.to_numpy()).tolist() == [[True] * 3, [False, True, False]]
    one = await sample(caller, BASE, num_samples=0, include_prompt_logprobs=True)
    assert one.prompt_logprobs is not None
    assert scores[1][0] == pytest.approx(one.prompt_logprobs[1])  # "i" is where it stands
    for sequence in result.sequences:
        of_tokens = sequence.top_logprobs
        assert of_tokens is not None and of_tokens.tokens.shape == (8, 4)
        assert of_tokens.tokens[0].tolist()[0] == sequence.tokens[0]  # greedy
        assert of_tokens.logprobs[0][0] == pytest.approx(sequence.logprobs[0])
        assert (np.diff(of_tokens.logprobs.to_numpy()) <= 0).all()
    flat = await sample(caller, BASE, num_samples=0, prompt_targets=TensorData([104, 105]))
    assert flat.prompt_target_logprobs is not None
    assert flat.prompt_target_logprobs.tolist()[1] == pytest.approx(one.prompt_logprobs[1])


async def test_several_targets_at_a_position_are_trained(caller: Caller) -> None:
    run = await caller.create()
    targets, weights = [[101, 104], [108, 111]], [[0.5, 0.5], [1.0, 0.25]]
    inputs = {"target_tokens": targets, "weights": weights}
    operation = ForwardBackward(
        datums=(Datum(model_input=[104, 101], loss_fn_inputs=inputs),), loss_fn="cross_entropy"
    )
    losses = []
    for _ in range(2):
        done = await caller.do(operation, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)
        lp = done.output.loss_fn_outputs[0]["logprobs"]
        assert lp.shape == (2, 2)
        assert done.output.metrics["loss"] == pytest.approx(
            -(lp.to_numpy() * weights).sum() / 2.25, rel=1e-6
        )
        losses.append(done.output.metrics["loss"])
    assert losses[1] < losses[0]


async def test_a_seed_repeats_whatever_runs_beside_it(caller: Caller) -> None:
    alone = await sample(caller, BASE, params=LONG)
    others = [await caller.start(Sample(sampler_id=BASE, prompt=HI, params=LONG)) for _ in range(9)]
    again = await sample(caller, BASE, params=LONG)
    assert alone == again
    for other in others:
        await caller.result(other)


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (Sample(sampler_id="base:none", prompt=HI, params=SHORT), "unknown_model"),
        (Sample(sampler_id="nothing", prompt=HI, params=SHORT), "not_found"),
        (Sample(sampler_id="weaver://r/sampler/x", prompt=HI), "checkpoint_not_found"),
        (Sample(sampler_id="weaver://r", prompt=HI), "invalid_name"),
        (Sample(sampler_id=BASE, prompt=HI, params=SHORT, num_samples=0), "invalid_params"),
        (Sample(sampler_id=BASE, prompt=HI, num_samples=0, top_logprobs=1), "invalid_params"),
        (
            Sample(sampler_id=BASE, prompt=HI, params=SHORT, prompt_targets=TensorData([1])),
            "invalid_datum",
        ),
        (
            Sample(sampler_id=BASE, prompt=HI, params=SHORT, prompt_targets=TensorData([[], []])),
            "invalid_datum",
        ),
        (
            Sample(sampler_id=BASE, prompt=HI, params=SHORT, prompt_targets=TensorData([0, 257])),
            "token_out_of_range",
        ),
        (
            Sample(sampler_id=BASE, prompt=HI, params=SHORT, prompt_targets=TensorData([0, -2])),
            "token_out_of_range",
        ),
        (
            Sample(
                sampler_id=BASE, prompt=HI, params=SHORT, prompt_targets=TensorData([[1] * 257] * 2)
            ),
            "invalid_datum",
        ),
        (Sample(sampler_id=BASE, prompt=ModelInput.from_ints([])), "invalid_datum"),
        (Sample(sampler_id=BASE, prompt=ModelInput.from_ints([257])), "token_out_of_range"),
        (
            Sample(
                sampler_id=BASE,
                prompt=HI,
                params=STOP_257,
            ),
            "token_out_of_range",
        ),
        (
            Sample(sampler_id=BASE, prompt=HI, params=SamplingParams(max_tokens=63)),
            "context_length_exceeded",
        ),
        (Sample(sampler_id=BASE, prompt="x" * 65), "context_length_exceeded"),
        (OpenSampler(), "invalid_request"),
        (OpenSampler(base_model="none"), "unknown_model"),
        (OpenSampler(model_path="weaver://r/x/y"), "invalid_name"),
        (OpenSampler(model_path="/nowhere"), "checkpoint_not_found"),
    ],
)
async def test_bad_requests_end_by_name(caller: Caller, operation: Operation, code: str) -> None:
    assert await caller.refused(operation) == code
    assert len((await sample(caller, BASE)).sequences) == 1


async def test_a_saved_sampler_never_changes(caller: Caller) -> None:
    run = await caller.create()
    await train(caller, run, steps=3)
    path = await caller.save(run, "sampler", name="x")
    before = await sample(caller, path)
    assert before.sequences[0].weights_version == 3
    await train(caller, run, steps=20)
    assert await sample(caller, path) == before
    newer = await caller.save(run, "sampler", name="y")
    assert (await sample(caller, newer)).sequences[0].logprobs != before.sequences[0].logprobs


async def test_an_unnamed_sampler_ends_with_its_session(caller: Caller, service: Service) -> None:
    run = await caller.create()
    path = await caller.save(run, "sampler")
    opened = await caller.do(OpenSampler(model_path=path), SamplerOpened)
    other = await Caller.open(service)
    assert (await sample(other, opened.sampler_id)).sequences
    await service.close_session(caller.session_id)
    operation = Sample(sampler_id=path, prompt=HI, params=SHORT)
    assert await other.refused(operation) == "checkpoint_not_found"


async def test_a_released_sampler_is_gone_once_its_samples_are_finished(
    caller: Caller, service: Service, engine: FakeEngine
) -> None:
    run = await caller.create()
    path = await caller.save(run, "sampler")
    other = await Caller.open(service)
    assert await other.refused(ReleaseSampler(sampler_id=path)) == "not_found"
    before = caller.stamp(Sample(sampler_id=path, prompt=HI, params=SHORT))
    release = caller.stamp(ReleaseSampler(sampler_id=path))
    await caller.send(before, release)
    assert isinstance(await caller.result(before.id), Sampled)
    assert isinstance(await caller.result(release.id), SamplerReleased)
    assert not engine.sampler.weights_ids
    for one in (caller, other):
        after = Sample(sampler_id=path, prompt=HI, params=SHORT)
        assert await one.refused(after) == "checkpoint_not_found"
    for sampler_id in (path, BASE, await caller.save(run, "sampler", name="x")):
        assert await caller.refused(ReleaseSampler(sampler_id=sampler_id)) == "not_found"


async def test_an_overwritten_sampler_is_the_new_one(caller: Caller) -> None:
    run = await caller.create()
    path = await caller.save(run, "sampler", name="x")
    await train(caller, run)
    again = SaveCheckpoint(purpose="sampler", name="x", overwrite=True)
    await caller.do(again, CheckpointSaved, run_id=run)
    assert (await sample(caller, path)).sequences[0].weights_version == 1


async def test_saved_weights_are_sampled_by_path_and_by_folder(
    open_service: ServiceOpener, home: Path
) -> None:
    async with open_service(FakeEngine(), home) as first:
        caller = await Caller.open(first)
        run = await caller.create()
        await train(caller, run, steps=3)
        path = await caller.save(run, "sampler", name="x")
        folder = str(home / "runs" / run / "sampler" / "x")
        wanted = await sample(caller, path)
    async with open_service(FakeEngine(models=("fake", "other")), home) as second:
        caller = await Caller.open(second)
        assert await sample(caller, path) == wanted  # the id needs no opening
        for model_path in (path, folder) if open_service is open_local else (path,):
            opened = await caller.do(OpenSampler(model_path=model_path), SamplerOpened)
            assert opened.weights_version == 3
            assert await sample(caller, opened.sampler_id) == wanted
        wrong = OpenSampler(model_path=path, base_model="other")
        assert await caller.refused(wrong) == "checkpoint_mismatch"


async def read(service: Service, caller: Caller, submission_id: str) -> list[SampleDelta]:
    return [delta async for delta in service.stream(caller.session_id, submission_id)]


async def test_a_stream_is_the_sample_in_pieces(caller: Caller, service: Service) -> None:
    params = SamplingParams(max_tokens=40, seed=3, stop=["e", "oz"])
    operation = Sample(
        sampler_id=BASE, prompt=HI, params=params, num_samples=3, stream=True, top_logprobs=2
    )
    submission_id = await caller.start(operation)
    pieces = await read(service, caller, submission_id)
    result = await caller.result(submission_id)
    assert isinstance(result, Sampled)
    for index, sequence in enumerate(result.output.sequences):
        mine = [piece for piece in pieces if piece.index == index]
        assert tuple(token for piece in mine for token in piece.tokens) == sequence.tokens
        assert "".join(piece.text for piece in mine) == sequence.text
        assert [p.stop_reason for p in mine] == [None] * (len(mine) - 1) + [sequence.stop_reason]
        assert sequence.top_logprobs is not None
        told = [row for p in mine if p.top_logprobs for row in p.top_logprobs.tokens.tolist()]
        assert told == sequence.top_logprobs.tokens.tolist()


async def test_a_stream_ends_with_the_error_of_its_sample(caller: Caller, service: Service) -> None:
    endless = Sample(sampler_id=BASE, prompt=HI, params=LONG, num_samples=4000, stream=True)
    submission_id = await caller.start(endless)
    await service.cancel(caller.session_id, [submission_id])
    with pytest.raises(OperationCancelledError):
        await read(service, caller, submission_id)
    silent = await caller.start(endless.model_copy(update={"stream": False}))
    with pytest.raises(NotFoundError):
        await read(service, caller, silent)


async def test_a_cancelled_sample_frees_its_slots(caller: Caller, service: Service) -> None:
    await caller.do(OpenSampler(base_model="fake"), SamplerOpened)
    operation = Sample(sampler_id=BASE, prompt=HI, params=LONG, num_samples=4000)
    holder = await caller.start(operation)  # a thousand turns of the four slots
    waiting = await caller.start(Sample(sampler_id=BASE, prompt=HI, params=SHORT))
    await service.cancel(caller.session_id, [holder])
    await caller.result(waiting)
    ended = await caller.outcome(holder)
    assert ended.error is not None and ended.error.code == "cancelled"


async def test_closing_a_session_cancels_its_samples(
    caller: Caller, service: Service, engine: FakeEngine
) -> None:
    operation = Sample(sampler_id=BASE, prompt=HI, params=LONG, num_samples=4000)
    await caller.start(operation)
    await service.close_session(caller.session_id)
    other = await Caller.open(service)
    await sample(other, BASE)
    assert not engine.sampler.busy
