"""The sampling client on the local service and the fake engine."""

from __future__ import annotations

import gc
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
import torch

from tests.client.helpers import DATUMS, STEP, fake_client
from tests.fake_engine import FakeEngine
from weaver import AsyncServiceClient, Message, ModelInput, SamplingParams
from weaver.errors import (
    CheckpointNotFoundError,
    ClosedError,
    ContextLengthError,
    InvalidDatumError,
    InvalidParamsError,
    InvalidRequestError,
    OperationCancelledError,
    TokenOutOfRangeError,
)
from weaver.server.service import LocalService
from weaver.tensors import TensorData

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.errors import WeaverError

pytestmark = pytest.mark.anyio
SHORT = SamplingParams(max_tokens=5, seed=1)


async def test_prompts_of_every_form(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        tokens = list(b"Hello")
        prompts = [
            ModelInput.from_ints(tokens),
            tokens,
            tuple(tokens),
            np.array(tokens),
            "Hello",
        ]
        results = [await sampler.sample(prompt, SHORT) for prompt in prompts]
        assert all(result == results[0] for result in results)
        assert results[0].prompt_tokens == tuple(tokens)
        sequence = results[0]["sequences"][0]
        assert len(sequence["tokens"]) == len(sequence["logprobs"]) <= 5
        chat = [{"role": "user", "content": "Hello"}]
        one, other = (
            await sampler.sample(chat, SHORT),
            await sampler.sample([Message(**chat[0])], SHORT),
        )
        assert one == other and len(one.prompt_tokens) > 5


async def test_a_list_of_prompts_gives_a_list_in_order(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        for prompts in (
            ["a", "b", "c"],
            [[97], [98], [99]],
            [ModelInput.from_ints([t]) for t in (97, 98, 99)],
            [np.array([97]), np.array([98]), np.array([99])],
        ):
            handle = sampler.sample(prompts, {"max_tokens": 2, "seed": 1}, num_samples=2)
            results = await handle
            assert [r.prompt_tokens for r in results] == [(97,), (98,), (99,)]
            assert all(len(r.sequences) == 2 for r in results)
            assert handle.status == "done"
        chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
        assert len(await sampler.sample(chats, SHORT)) == 2


async def test_one_bad_prompt_of_a_list_fails_before_any_is_queued(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        with pytest.raises(InvalidDatumError, match=r"prompt\[1\]"):
            sampler.sample([[97], []], SHORT)


async def test_logprobs_of_a_prompt(tmp_path: Path) -> None:
    async with fake_client(tmp_path, context_length=16) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        logprobs = await sampler.compute_logprobs("Hello")
        assert logprobs[0] is None and len(logprobs) == 5
        assert all(isinstance(value, float) and value < 0 for value in logprobs[1:])
        sampled = await sampler.sample(list(b"Hello"), SHORT, include_prompt_logprobs=True)
        assert list(sampled.prompt_logprobs or ()) == logprobs
        assert len(await sampler.compute_logprobs([65] * 16)) == 16
        with pytest.raises(ContextLengthError):
            sampler.compute_logprobs([65] * 17)


async def test_what_is_said_of_a_prompt_beside_its_tokens(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        prompt, plain = list(b"Hello"), await sampler.compute_logprobs("Hello")
        for text in (prompt, "Hello"):
            top = await sampler.compute_logprobs(text, top_k=3)
            assert list(top.prompt_logprobs or ()) == plain and top.sequences == ()
            assert top.prompt_top_logprobs is not None and top.prompt_target_logprobs is None
            assert top.prompt_top_logprobs.tokens.shape == (5, 3)
            for targets in (prompt, np.array(prompt), torch.tensor(prompt), TensorData(prompt)):
                told = (
                    await sampler.compute_logprobs(text, targets=targets)
                ).prompt_target_logprobs
                assert told is not None and told.shape == (5,)
                np.testing.assert_allclose(told.to_numpy()[1:], plain[1:], rtol=1e-6)
        with pytest.raises(InvalidDatumError, match="the prompt has 5 tokens"):
            await sampler.compute_logprobs("Hello", targets=[1, 2])
        both = await sampler.compute_logprobs(prompt, top_k=2, targets=[[1, 2, -1]] * 5)
        assert both.prompt_target_logprobs is not None and both.prompt_top_logprobs is not None
        assert both.prompt_target_logprobs.shape == (5, 3)
        sampled = await sampler.sample(prompt, SHORT, top_logprobs=2, prompt_top_logprobs=2)
        assert sampled.prompt_top_logprobs == both.prompt_top_logprobs
        assert sampled["sequences"][0]["top_logprobs"]["tokens"].shape[1] == 2
        async for delta in sampler.stream(prompt, SHORT, top_logprobs=2):
            assert delta.top_logprobs is not None and delta.top_logprobs.tokens.shape == (1, 2)


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ({"top_k": 0}, InvalidParamsError, "top_k"),
        ({"top_k": 257}, InvalidParamsError, "top_k"),
        ({"top_k": True}, InvalidParamsError, "top_k"),
        ({"top_k": "3"}, InvalidParamsError, "top_k"),
        ({"targets": [1, 2, 3]}, InvalidDatumError, "targets.*prompt has 5"),
        ({"targets": [[[1]]] * 5}, InvalidDatumError, "targets"),
        ({"targets": [[]] * 5}, InvalidDatumError, "targets"),
        ({"targets": [[1] * 257] * 5}, InvalidDatumError, "K up to 256"),
        ({"targets": [0.5] * 5}, InvalidDatumError, "targets"),
        ({"targets": [[1], [2, 3], [1], [1], [1]]}, InvalidDatumError, "targets"),
        ({"targets": [1, 2, 3, 4, 257]}, TokenOutOfRangeError, "targets"),
        ({"targets": [1, 2, 3, 4, -2]}, TokenOutOfRangeError, "targets"),
    ],
)
async def test_what_cannot_be_said_of_a_prompt_is_refused_at_the_call(
    tmp_path: Path, asked: dict[str, Any], error: type[WeaverError], match: str
) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        with pytest.raises(error, match=match):
            sampler.compute_logprobs(list(b"Hello"), **asked)
        for name in ("top_logprobs", "prompt_top_logprobs"):
            for count in (-1, 257, 2.5):
                with pytest.raises(InvalidParamsError, match=name):
                    sampler.sample("Hello", SHORT, **{name: count})


async def test_a_snapshot_does_not_move_with_training(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        before = trainer.save_weights_and_get_sampling_client()
        trainer.forward_backward(DATUMS)
        trainer.optim_step(STEP)
        after = trainer.save_weights_and_get_sampling_client(name="after")
        trainer.forward_backward(DATUMS)
        trainer.optim_step(STEP)
        zero, one = await before, await after
        assert (zero.weights_version, one.weights_version) == (0, 1)
        assert (zero.base_model, one.model_info.name) == ("fake", "fake")
        old, new = await zero.compute_logprobs("Hel"), await one.compute_logprobs("Hel")
        assert old != new
        again = await client.create_sampling_client(f"weaver://{trainer.model_id}/sampler/after")
        assert await again.compute_logprobs("Hel") == new
        base = await client.create_sampling_client(base_model="fake")
        assert await base.compute_logprobs("Hel") == old


async def test_a_sampler_needs_weights_that_exist(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        with pytest.raises(InvalidRequestError, match="model_path or base_model"):
            client.create_sampling_client()
        with pytest.raises(CheckpointNotFoundError):
            await client.create_sampling_client("weaver://nothing/sampler/x")
        with pytest.raises(CheckpointNotFoundError, match="is given as base_model"):
            await client.create_sampling_client("fake")


async def test_a_cancelled_sample_ends(tmp_path: Path) -> None:
    async with fake_client(tmp_path, context_length=10**9) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        endless = {"max_tokens": 10**8, "stop_token_ids": []}
        for prompts in ("a", ["a", "b"]):
            handle = sampler.sample(prompts, endless, num_samples=64)
            with anyio.move_on_after(0.1):
                await handle
            assert handle.status in ("queued", "running")
            assert handle.cancel()
            with pytest.raises(OperationCancelledError):
                await handle
            assert handle.status == "cancelled"
        await sampler.sample("a", SHORT)


async def test_streaming_gives_the_pieces_of_the_sample(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        whole = await sampler.sample("Hello", SHORT, num_samples=3)
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        reasons: dict[int, str] = {}
        async for delta in sampler.stream("Hello", SHORT, num_samples=3):
            tokens[delta.index] += delta.tokens
            if delta.stop_reason:
                reasons[delta.index] = delta.stop_reason
        assert [tuple(tokens[i]) for i in range(3)] == [s.tokens for s in whole.sequences]
        assert [reasons[i] for i in range(3)] == [s.stop_reason for s in whole.sequences]


async def test_leaving_a_stream_early_frees_it(tmp_path: Path) -> None:
    async with fake_client(tmp_path, context_length=10**9, slots=1) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        stream = sampler.stream("a", {"max_tokens": 10**8})
        async with aclosing(stream):
            async for _ in stream:
                break
        await sampler.sample("a", SHORT)  # there is one slot


async def test_a_stream_reports_its_error(tmp_path: Path) -> None:
    async with fake_client(tmp_path, context_length=4) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        with pytest.raises(ContextLengthError):
            sampler.stream([1, 2, 3], {"max_tokens": 2})
        with pytest.raises(ContextLengthError):
            async for _ in sampler.stream("too long", SHORT):
                pass


async def test_a_thousand_samples_at_once(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        sampler = await client.create_sampling_client(base_model="fake")
        handles = [sampler.sample([i % 256], {"max_tokens": 3, "seed": i}) for i in range(1000)]
        results = [await handle for handle in handles]
        assert [r.prompt_tokens[0] for r in results] == [i % 256 for i in range(1000)]


async def test_weights_without_a_name_go_with_their_client(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with (
        LocalService(engine, home=tmp_path) as service,
        AsyncServiceClient(service=service, home=tmp_path) as client,
    ):
        trainer = await client.create_model("fake", {"rank": 4})

        def loaded() -> int:
            return sum("unnamed" in name for name in engine.sampler.weights_ids)

        sampler = await trainer.save_weights_and_get_sampling_client()
        again = await client.create_sampling_client(model_path=sampler.sampler_id)
        await again.close()
        with pytest.raises(ClosedError):
            again.sample("x")
        pending = sampler.sample("x", num_samples=50)
        await sampler.close()
        assert len((await pending).sequences) == 50 and loaded() == 0
        await sampler.close()
        late = client.create_sampling_client(model_path=sampler.sampler_id)
        with pytest.raises(CheckpointNotFoundError):
            await late
        pieces = (await trainer.save_weights_and_get_sampling_client()).stream("x")
        handle = (await trainer.save_weights_and_get_sampling_client()).sample("x")
        gc.collect()
        assert loaded() == 2
        assert [piece async for piece in pieces] and (await handle).sequences
        del pieces, handle
        gc.collect()
        while loaded():
            await trainer.forward(DATUMS)
