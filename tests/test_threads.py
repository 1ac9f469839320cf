"""Programs that end while their threads compute in torch end as they would without them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

BEGIN = """
import asyncio, os, signal, sys, threading, time
import torch
from weaver import AsyncServiceClient, Datum, ServiceClient

tokens = list(range(3, 203))
rows = [Datum(model_input=tokens, loss_fn_inputs={"target_tokens": tokens[1:] + [203]})] * 256

def train(service):
    trainer = service.create_model("weaver-nano", lora_config={"rank": 2})
    handles = [trainer.forward_backward(rows) for _ in range(60)]
    time.sleep(0.3)  # the first of them takes longer
    return handles

def multiply(*_):
    begun.set()
    for _ in range(400):
        ones = torch.ones(1500, 1500).requires_grad_()
        (ones @ ones).sum().backward()

begun = threading.Event()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
"""
TRAIN = "service = ServiceClient()\nhandles = train(service)\n"
ASYNC = """
async def main():
    async with AsyncServiceClient() as service:
        trainer = await service.create_model("weaver-nano", {"rank": 2})
        handles = [trainer.forward_backward(rows) for _ in range(60)]
        await asyncio.sleep(0.3)
        begun.set()
"""
PROGRAMS = {
    "end": (TRAIN, 0),
    "raise": ("with ServiceClient() as service:\n    train(service)\n    raise ValueError", 1),
    "interrupt": (
        TRAIN
        + "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    handles[0].result()\n"
        + "except KeyboardInterrupt:\n    sys.exit(2)",
        2,
    ),
}
MORE_PROGRAMS = {
    "exit": (TRAIN + "sys.exit(3)", 3),
    "close": (TRAIN + "service.close()\nsys.exit(3)", 3),
    "forget": (TRAIN + "del service, handles\nsys.exit(3)", 3),
    "terminate": (TRAIN + "os.kill(os.getpid(), signal.SIGTERM)", -15),
    "handled": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n"
        + TRAIN
        + "os.kill(os.getpid(), signal.SIGTERM)\nhandles[0].result()",
        4,
    ),
    "async": (ASYNC + "        raise ValueError\nasyncio.run(main())", 1),
    "async exit": (ASYNC + "        sys.exit(5)\nasyncio.run(main())", 5),
    "daemon": (
        ASYNC
        + "        await handles[-1]\n"
        + "threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()\nbegun.wait()",
        0,
    ),
    "load": (
        "threading.Thread(target=lambda: train(ServiceClient()), daemon=True).start()\n"
        "time.sleep(1.5)\nsys.exit(6)",
        6,
    ),
    "sample": (
        "service = ServiceClient()\n"
        "sampler = service.create_sampling_client(base_model='weaver-nano')\n"
        "handle = sampler.sample('a', {'max_tokens': 200}, num_samples=256, wait=False)\n"
        "time.sleep(0.5)\nsys.exit(7)",
        7,
    ),
    "custom loss": (
        "service = ServiceClient()\n"
        "trainer = service.create_model('weaver-nano', {'rank': 2})\n"
        "handle = trainer.forward_backward_custom(rows[:1], multiply)\nbegun.wait()\nsys.exit(8)",
        8,
    ),
    "reward": (
        "import weaver_rl as rl, weaver_rl.rewards\n"
        "reply = rl.Reply(text='', tokens=(), logprobs=(), sampling_logprobs=(), "
        "stop_reason='stop')\n"
        "score = rl.rewards.scorer(multiply)\n"
        "run = lambda: asyncio.run(score({}, [reply]))\n"
        "threading.Thread(target=run, daemon=True).start()\nbegun.wait()\nsys.exit(9)",
        9,
    ),
}


def check(program: str, code: int, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        env={**os.environ, "WEAVER_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code, done.stderr
    assert (done.stderr.split() or [""])[-1] == ("ValueError" if code == 1 else ""), done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_it_would_while_the_engine_trains(name: str, tmp_path: Path) -> None:
    check(*PROGRAMS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_PROGRAMS)
def test_whatever_computes_and_however_it_ends(name: str, tmp_path: Path) -> None:
    check(*MORE_PROGRAMS[name], tmp_path)


def test_a_thread_that_cannot_be_interrupted_holds_up_no_end(tmp_path: Path) -> None:
    program = """
import asyncio, threading, time
from weaver.threads import in_daemon_thread
def hang():
    begun.set()
    time.sleep(60)
begun = threading.Event()
threading.Thread(target=lambda: asyncio.run(in_daemon_thread(hang)), daemon=True).start()
begun.wait()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
