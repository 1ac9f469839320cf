"""Messages made to hold a server up or to fill it: others' /healthz answers, and memory returns.

Each is sent with a good key to a server process; a thread asks for /healthz meanwhile.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np
import pytest
import zstandard
from pydantic import TypeAdapter

from tests.server.test_kill import TORCH, Server, running
from weaver import wire
from weaver.protocol import (
    MEDIA_TYPE,
    CreateModel,
    ForwardBackward,
    ModelCreated,
    Outcome,
    Sample,
    Submission,
)
from weaver.types import Datum, ModelInput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow
ANSWERS_S = 0.5
RETURNS_BYTES = 256 * 2**20
"""More than this may not stay, of what was there before all attacks: the allocator keeps some."""
MIB = 2**20
BASE = "base:weaver-nano"
FEW = ModelInput.from_ints([1, 2])
OUTCOMES = TypeAdapter(tuple[Outcome, ...])


class Watch:
    """Asks for /healthz until it is left; `worst_s` is the longest that it took."""

    def __init__(self, url: str) -> None:
        self.worst_s = 0.0
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._over.wait(0.02):
                began = time.monotonic()
                http.get("/healthz").raise_for_status()
                self.worst_s = max(self.worst_s, time.monotonic() - began)


class Attacker:
    """One project's client, without the manners of ours."""

    def __init__(self, server: Server) -> None:
        headers = {"Authorization": f"Bearer {server.keys[0]}"}
        self.http = httpx.Client(base_url=server.url, headers=headers, timeout=120)
        self._prepared: list[httpx.Request] = []
        self.session = self.open()
        self.run = ""

    def open(self) -> str:
        session: str = self.http.post("/v1/sessions", json={}).json()["session_id"]
        return session

    def raw(self, data: bytes) -> None:
        path = f"/v1/sessions/{self.session}/submissions"
        self._prepare("POST", path, content=data, headers={"Content-Type": MEDIA_TYPE})

    def submit(self, *operations: Any, seq: int | None = None) -> None:
        run, name = self.run if seq else None, f"a{time.monotonic_ns()}"
        self.raw(
            wire.encode(
                [
                    Submission(id=f"{name}-{i}", operation=one, run_id=run, seq=seq)
                    for i, one in enumerate(operations)
                ]
            )
        )

    def post(self, path: str, text: str) -> None:
        self._prepare("POST", path, content=text, headers={"Content-Type": "application/json"})

    def close(self) -> None:
        self._prepare("DELETE", f"/v1/sessions/{self.session}")
        self.session = self.open()

    def _prepare(self, *args: Any, **kwargs: Any) -> None:
        self._prepared.append(self.http.build_request(*args, **kwargs))

    def strike(self) -> int:
        """Sends what was prepared; answers the last status."""
        status = [self.http.send(request).status_code for request in self._prepared][-1]
        self._prepared.clear()
        return status

    def created(self) -> str:
        self.submit(CreateModel(base_model="weaver-nano"))
        self.strike()
        path = f"/v1/sessions/{self.session}/outcomes"
        reply = self.http.get(path, params={"after": 0, "timeout": 20})
        [outcome] = wire.decode(reply.content, OUTCOMES)
        assert isinstance(outcome.result, ModelCreated)
        return outcome.result.run.run_id


def message(header: bytes, arrays: bytes = b"") -> bytes:
    frame = zstandard.compress(arrays) if arrays else b""
    lengths = len(header).to_bytes(4, "little") + len(arrays).to_bytes(8, "little")
    return wire.MAGIC + lengths + header + frame


def note(attacker: Attacker) -> None:
    operation = b'{"kind":"open_sampler","base_model":"weaver-nano"}'
    header = b'[{"id":"n","operation":%s,"note":{"$bytes":["u1",[%d],0]}}]'
    attacker.raw(message(header % (operation, 64 * MIB), b"a" * (64 * MIB)))


def shape(attacker: Attacker) -> None:
    sizes = b",".join([b"9223372036854775807"] * 30_000)
    attacker.raw(message(b'[{"$list":["i4",[' + sizes + b"],0]}]"))


def inflating(attacker: Attacker) -> None:
    attacker.raw(message(b'[{"$list":["f4",[%d],0]}]' % (32 * MIB), bytes(128 * MIB)))


def noise(attacker: Attacker) -> None:
    random = np.random.default_rng(0).bytes(64 * MIB)
    attacker.raw(message(b'[{"$list":["f4",[%d],0]}]' % (16 * MIB), random))


def lists(attacker: Attacker) -> None:
    attacker.raw(message(b"[" + b"[]," * 130_000 + b"[]]"))


def names(attacker: Attacker) -> None:
    options = {f"k{i}": [] for i in range(125_000)}
    operation = {"kind": "forward_backward", "datums": [], "loss_fn": "x"}
    tree = [{"id": "a", "operation": {**operation, "loss_fn_config": options}}]
    attacker.raw(message(json.dumps(tree).encode()))


def long_prompt(attacker: Attacker) -> None:
    attacker.submit(Sample(sampler_id=BASE, prompt="a" * 2_000_000))


def prompts(attacker: Attacker) -> None:
    sample = Sample(sampler_id=BASE, prompt="ab cd " * 2_000, params=SamplingParams(max_tokens=1))
    attacker.submit(*[sample] * 1_000)


def long_sequence(attacker: Attacker) -> None:
    tokens = np.ones(4 * MIB, np.int64)
    datum = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": tokens})
    operation = ForwardBackward(datums=(datum,), loss_fn="cross_entropy")
    attacker.submit(operation, seq=1)


def many_datums(attacker: Attacker) -> None:
    datum = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [1, 9_999_999]})
    operation = ForwardBackward(datums=(datum,) * 10_000, loss_fn="cross_entropy")
    attacker.submit(operation, seq=2)


def metrics(attacker: Attacker) -> None:
    points = json.dumps({"points": [{"name": "a", "value": None}] * 10_000})
    attacker.post(f"/v1/runs/{attacker.run}/metrics", points)


def json_lists(attacker: Attacker) -> None:
    attacker.post("/v1/sessions", '{"user_metadata":{"a":[' + "[]," * 65_000 + "[]]}}")


def rest_numbers(attacker: Attacker) -> None:
    attacker.post("/api/v1/sessions", '{"x":[' + "0.12345," * 2_000_000 + "1]}")


def rest_texts(attacker: Attacker) -> None:
    datum = {"model_input": {"chunks": [{"tokens": [1]}]}}
    texts = ["x" * MIB, *[""] * 100_000]
    given = {"loss_fn": "ppo", "data": [{**datum, "loss_fn_inputs": {"advantages": texts}}]}
    body = json.dumps({"payload": {"forward_backward_input": given}})
    attacker.post(f"/api/v1/models/{attacker.run}/forward-backward-passes", body)


def waiting(attacker: Attacker) -> None:
    """10,000 samples wait when their session ends."""
    attacker.session = attacker.open()
    sample = Sample(sampler_id=BASE, prompt=FEW, params=SamplingParams(max_tokens=1000))
    for _ in range(10):
        attacker.submit(*[sample] * 1_000)
    attacker.close()


def streams(attacker: Attacker) -> None:
    """1,000 streams at once."""
    attacker.session = attacker.open()
    params = SamplingParams(max_tokens=64)
    attacker.submit(*[Sample(sampler_id=BASE, prompt=FEW, params=params, stream=True)] * 1_000)


ATTACKS: dict[Callable[[Attacker], None], tuple[int, ...]] = {
    note: (400, 413),
    shape: (400,),
    inflating: (413,),
    noise: (400, 413, 422),
    lists: (400, 422),
    names: (400, 422),
    long_prompt: (202,),
    prompts: (202, 429),
    long_sequence: (202,),
    many_datums: (202,),
    metrics: (422,),
    json_lists: (413,),
    rest_numbers: (201, 413),
    rest_texts: (400, 422),
    waiting: (204,),
    streams: (202,),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("home"), TORCH) as server:
        yield server


@pytest.fixture(scope="module")
def attacker(server: Server) -> Iterator[Attacker]:
    attacker = Attacker(server)
    with closing(attacker.http):
        attacker.run = attacker.created()
        yield attacker


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_others_are_answered_and_memory_returns(
    server: Server, attacker: Attacker, attack: Callable[[Attacker], None]
) -> None:
    attack(attacker)
    before = resident_bytes(server)
    with Watch(server.url) as watch:
        status = attacker.strike()
        time.sleep(2)
    stayed = resident_bytes(server) - before
    assert status in ATTACKS[attack]
    busy = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    assert watch.worst_s < ANSWERS_S * busy  # as it would be on a machine of its own
    assert stayed < RETURNS_BYTES


def resident_bytes(server: Server) -> int:
    lines = Path(f"/proc/{server._process.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
