"""What OpenAI's front takes of the sampler: 64 clients at once, a chat of 64 tokens each.

The torch engine with random weights of 60 million parameters, in a process of its own that also
draws the same samples without a front, in turns with it: so both have the same weights, memory and
machine. Bound (issue 12): the front costs at most a tenth of the throughput. CPU time says the same
where other work runs beside it; what its clients take is in another process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from tests.benchmarks.figures import Figure
from tests.benchmarks.peers.shapes import made

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.engine.base import SampleProgress
    from weaver.server.serve import Running

CLIENTS, TOKENS, WORDS, ROUNDS = 64, 64, 24, 5
TEMPLATE = "{% for m in messages %}{{ 'w1 ' + m['content'] + ' w2 ' }}{% endfor %}"
Spent = tuple[float, float]
"""Seconds on the clock, and of the server's CPU."""


def words(client: int) -> str:
    return " ".join(f"w{3 + client * WORDS + i}" for i in range(WORDS))


# --- the server -----------------------------------------------------------------------------------


async def serve(model: str, home: str) -> None:
    """Draws samples without a front for each `alone CLIENTS` on stdin, and tells its CPU time."""
    from weaver.engine.base import WeightsRef
    from weaver.engine.torch.engine import TorchEngine
    from weaver.server.serve import run_server
    from weaver.server.settings import ServerSettings
    from weaver.types import Message

    engine = TorchEngine({"it": model})
    settings = ServerSettings(home=Path(home), port=0, auth=False)
    await engine.publish("alone", WeightsRef(base_model="it"))
    running: list[Running] = []

    def started(one: Running) -> None:
        running.append(one)
        print(json.dumps(one.address), flush=True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(run_server, engine, settings, started=started))
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            if line.startswith("alone"):
                count = int(line.split()[1])
                chats = [[Message(role="user", content=words(i))] for i in range(count)]
                await alone(engine, [engine.encode("it", chat) for chat in chats])
            print(json.dumps(time.process_time()), flush=True)
        running[0].stop()


async def alone(engine: Any, prompts: list[list[int]]) -> None:
    from weaver.engine.base import SampleJob
    from weaver.types import SamplingParams

    left, done = len(prompts), anyio.Event()

    def tell(progress: SampleProgress) -> None:
        nonlocal left
        assert progress.error is None, progress.error
        left -= progress.result is not None
        if left == 0:
            done.set()

    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=TOKENS, seed=i)
        engine.sample(
            SampleJob(
                job_id=f"{time.monotonic_ns()}-{i}",
                weights_id="alone",
                prompt=prompt,
                params=params,
                num_samples=1,
            ),
            tell,
        )
    await done.wait()


# --- its clients ----------------------------------------------------------------------------------


async def together(address: str, clients: int, *, stream: bool) -> None:
    """As many clients at once, each with a connection of its own."""

    async def one(i: int) -> None:
        body = {
            "model": "it",
            "messages": [{"role": "user", "content": words(i)}],
            "max_tokens": TOKENS,
            "seed": i,
            "stream": stream,
        }
        async with httpx.AsyncClient(base_url=address, timeout=600, verify=False) as client:
            reply = await client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        if not stream:
            assert reply.json()["usage"]["completion_tokens"] == TOKENS

    async with anyio.create_task_group() as tasks:
        for i in range(clients):
            tasks.start_soon(one, i)


class Measured:
    """A server whose rounds are timed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout
        self.address: str = self._read()

    def ask(self, line: str) -> float:
        """Its CPU seconds, once it has done that."""
        self._in.write(f"{line}\n")
        self._in.flush()
        return float(self._read())

    def timed(self, clients: int, *, front: bool, stream: bool = False) -> Spent:
        cpu, began = self.ask("cpu"), time.perf_counter()
        if front:
            anyio.run(partial(together, self.address, clients, stream=stream))
            spent = time.perf_counter() - began
            return spent, self.ask("cpu") - cpu
        after = self.ask(f"alone {clients}")
        return time.perf_counter() - began, after - cpu

    def _read(self) -> Any:
        return json.loads(self._out.readline())


def with_template(source: Path, folder: Path) -> Path:
    """The same model with a chat template."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.absolute())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def figures(smoke: bool) -> Iterator[Figure]:
    clients, rounds, shape = (4, 1, "nano") if smoke else (CLIENTS, ROUNDS, "60m")
    with tempfile.TemporaryDirectory() as root:
        model = with_template(made(shape), Path(root) / "model")
        command = [sys.executable, "-m", "tests.benchmarks.chats", str(model), f"{root}/home"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            server = Measured(process)
            for front in (False, True):
                server.timed(clients, front=front)  # reads the model, and warms up
            kinds = ({"front": False}, {"front": True}, {"front": True, "stream": True})
            spent = [[server.timed(clients, **kind) for kind in kinds] for _ in range(rounds)]
            assert process.stdin is not None
            process.stdin.close()
    bare, whole, streamed = zip(*spent, strict=True)
    tokens = clients * TOKENS
    yield Figure("the sampler alone", tuple(tokens / s for s, _ in bare), "tokens/s")
    yield Figure("chats of clients at once", tuple(tokens / s for s, _ in whole), "tokens/s")
    yield Figure("the same as streams", tuple(tokens / s for s, _ in streamed), "tokens/s")
    pairs = list(zip(bare, whole, strict=True))
    lost = tuple(100 * (1 - one[0] / two[0]) for one, two in pairs)
    yield Figure("lost to the front", lost, "%", at_most=None if smoke else 10)
    more = tuple(100 * (two[1] / one[1] - 1) for one, two in pairs)
    yield Figure("CPU of the server, more than the sampler's", more, "%")
    of_each = statistics.median(two[1] - one[1] for one, two in pairs) / clients
    yield Figure("CPU of the front for a chat", (1e3 * of_each,), "ms")


if __name__ == "__main__":
    anyio.run(serve, *sys.argv[1:])
