"""Clients in forks and in other event loops than their own: named errors, and ends that come."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.client.helpers import DATUMS, STEP, fake_client
from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

FORK = """
import asyncio, gc, multiprocessing, os, sys, threading, weaver
from weaver.client import opening
from tests.fake_engine import FakeEngine

release = threading.Event()
opening._torch_engine = lambda settings: FakeEngine(
    hook=lambda name, argument: release.wait(20) if name == "gradient" else None
)
client = weaver.ServiceClient(home=sys.argv[1])
trainer = client.create_model("fake")
sampler = client.create_sampling_client(base_model="fake")
datum = weaver.Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})
done = sampler.sample("a", {"max_tokens": 1}, wait=False)
done.result()
pending = trainer.forward_backward([datum])

def refused():
    for call in (
        pending.result, pending.cancel, client.list_training_runs, trainer.get_info,
        lambda: trainer.optim_step({}), lambda: sampler.sample("a"), sampler.close,
    ):
        try:
            call()
        except weaver.UnsupportedError as error:
            assert "fork" in str(error) and "new client" in str(error)
        else:
            raise AssertionError(call)
    assert done.result()["sequences"]  # what is there can be read anywhere

def inherited():
    sys.exit(3)

def closed():
    refused()
    client.close()
    sys.exit(3)

def left():
    with client:
        sys.exit(3)

def collected():
    global client, trainer, sampler, pending, done
    del client, trainer, sampler, pending, done
    gc.collect()
    sys.exit(3)

def renewed():
    release.set()
    with weaver.ServiceClient(home=sys.argv[1] + "-child") as mine:
        assert mine.create_model("fake").forward_backward([datum], wait=True)
    sys.exit(3)

for ending in (inherited, closed, left, collected, renewed):
    child = os.fork()
    if child == 0:
        ending()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, ending
process = multiprocessing.get_context("fork").Process(target=refused)
process.start()
process.join(10)
assert process.exitcode == 0
release.set()
assert pending.result()["metrics"]["loss"] > 0  # the parent goes on

async def main():
    async with weaver.AsyncServiceClient(home=sys.argv[1] + "-async") as service:
        theirs = await service.create_sampling_client(base_model="fake")

        def use():
            try:
                asyncio.run(theirs.get_tokenizer())
            except weaver.UnsupportedError:
                os._exit(4)

        process = multiprocessing.get_context("fork").Process(target=use)
        process.start()
        await asyncio.to_thread(process.join, 10)
        assert process.exitcode == 4
        assert (await theirs.sample("a", {"max_tokens": 1}))["sequences"]

asyncio.run(main())
"""


def test_forks_end_and_are_told_what_they_lack(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "home")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.anyio
async def test_another_event_loop_is_refused(tmp_path: Path) -> None:
    release = threading.Event()

    def hold(name: str, argument: object) -> None:
        if name == "optim_step":
            release.wait(20)

    async with fake_client(tmp_path, hook=hold) as client:
        trainer = await client.create_model("fake")
        sampler = await client.create_sampling_client(base_model="fake")
        done = trainer.forward_backward(DATUMS)
        assert (await done).metrics["loss"] > 0
        pending = trainer.optim_step(STEP)

        async def stream() -> None:
            async for _ in sampler.stream("a"):
                pass

        async def cancel() -> bool:
            return pending.cancel()

        async def step() -> Any:
            return await trainer.optim_step(STEP)

        async def another() -> Any:
            return await client.create_model("fake")

        calls: list[Callable[[], Awaitable[Any]]] = [
            pending.result,
            cancel,
            step,
            another,
            stream,
            client.list_training_runs,
            client.close,
            trainer.get_info,
            trainer.get_tokenizer,
            sampler.get_tokenizer,
            lambda: trainer.log_metrics({"a": 1.0}, step=1),
        ]

        def elsewhere() -> None:
            for call in calls:
                with pytest.raises(UnsupportedError, match="event loop"):
                    asyncio.run(asyncio.wait_for(as_coroutine(call), 5))
            with pytest.raises(UnsupportedError, match="event loop"):
                trainer.optim_step(STEP)  # from no event loop at all
            assert asyncio.run(done.result()).metrics["loss"] > 0

        await anyio.to_thread.run_sync(elsewhere)
        release.set()
        assert (await pending).metrics["step"] == 1
        assert (await trainer.get_info()).step == 1


async def as_coroutine(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()
