"""Prompts that are text: encoded beside the engine, and counted like any others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import GRADIENT, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_service import Recorder
from weaver.errors import OperationCancelledError, TooLargeError
from weaver.protocol import GradientsDone, ReleaseSampler, Sample, Sampled
from weaver.server.keys import Caller as Who
from weaver.server.service import LocalService
from weaver.server.settings import Limits
from weaver.types import Message, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
FEW = SamplingParams(max_tokens=2)
CHAT = (Message(role="user", content="hello"),)
TEXT = Sample(sampler_id="base:fake", prompt="hello", params=FEW)


@pytest.mark.parametrize("prompt", ["hello", CHAT], ids=["text", "chat"])
async def test_nobody_waits_while_a_text_is_encoded(
    home: Path, prompt: str | tuple[Message, ...]
) -> None:
    record = Recorder()
    async with LocalService(FakeEngine(hook=record), home=home) as service:
        mine = await Caller.open(service.seen_by(Who("a")))
        other = await Caller.open(service.seen_by(Who("b")))
        run = await other.create()
        record.hold = "encode"
        slow = mine.stamp(TEXT.model_copy(update={"prompt": prompt}))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mine.send, slow)
            await record.until_held()
            record.hold = None
            with anyio.fail_after(10):
                await other.do(GRADIENT, GradientsDone, run_id=run)
                await other.do(TEXT, Sampled)  # another project's text is encoded meanwhile
            record.go_on.set()
        assert (await mine.outcome(slow.id)).error is None


async def test_a_sample_that_is_cancelled_while_it_is_encoded_never_begins(home: Path) -> None:
    record = Recorder()
    async with LocalService(FakeEngine(hook=record), home=home) as service:
        caller = await Caller.open(service)
        record.hold = "encode"
        slow = caller.stamp(TEXT)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller.send, slow)
            await record.until_held()
            await service.cancel(caller.session_id, [slow.id])
            record.go_on.set()
        error = (await caller.outcome(slow.id)).error
        assert error is not None
        assert error.code == OperationCancelledError.code
        assert record.count("add") == 0


async def test_a_sampler_is_released_after_the_texts_that_were_sent_before(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home) as service:
        caller = await Caller.open(service)
        sampler = await caller.save(await caller.create(), "sampler")
        sample = caller.stamp(TEXT.model_copy(update={"sampler_id": sampler}))
        release = caller.stamp(ReleaseSampler(sampler_id=sampler))
        await caller.send(sample, release)
        assert (await caller.outcome(sample.id)).error is None


@pytest.mark.parametrize("prompt", ["x" * 9, [120] * 9], ids=["text", "tokens"])
async def test_what_a_sample_reads_counts_among_its_tokens(
    home: Path, prompt: str | list[int]
) -> None:
    limits = Limits(operation_tokens=10)
    async with LocalService(FakeEngine(), home=home, limits=limits) as service:
        caller = await Caller.open(service)
        chunks = prompt if isinstance(prompt, str) else {"chunks": [{"tokens": prompt}]}
        operation = Sample(sampler_id="base:fake", prompt=chunks, params=FEW)
        outcome = await caller.outcome(await caller.start(operation))
        assert outcome.error is not None
        assert outcome.error.code == TooLargeError.code
        assert "11 tokens" in outcome.error.message
