"""A server that is killed at random moments beside the loops of three tenants, or its database.

Nothing is lost or repeated: each loop sees what it sees on a server that nothing disturbs.
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import GRADIENT, STEP, Caller
from weaver import AsyncServiceClient, Datum, ModelInput
from weaver.client.http import HttpService
from weaver.engine.torch.catalog import NANO
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.server.serve import GRACE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.postgres import Postgres

pytestmark = pytest.mark.anyio
TENANTS = range(3)
SERVER = """
import sys, time
from functools import partial
from pathlib import Path
import anyio
from weaver.server.serve import run_server
from weaver.server.settings import Durability, ServerSettings
{engine}
settings = ServerSettings(
    home=Path(sys.argv[1]), database_url=sys.argv[2] or None, port=int(sys.argv[3]),
    deterministic=True, durability=Durability(snapshot_every_s=0.3),
)
anyio.run(partial(run_server, engine, settings, started=lambda server: None))
"""
FAKE = """
from tests.fake_engine import FakeEngine
engine = FakeEngine(hook=lambda name, argument: time.sleep(0.004))
"""
TORCH = """
from weaver.engine.torch.engine import TorchEngine
engine = TorchEngine(threads=1, deterministic=True)
"""
BASES = """
from weaver.engine.torch.engine import TorchEngine
models = {"other": PLACE}
engine = TorchEngine(models, threads=1, deterministic=True, model_memory_gb=0.003)
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Server:
    """A server process on a port of its own, which can be killed and started again.

    `keys` has one for the project of each tenant.
    """

    def __init__(self, home: Path, engine: str, url: str | None) -> None:
        database = open_database(home, url)
        self.keys = [Keys(database).create(f"project-{tenant}")[1] for tenant in TENANTS]
        database.dispose()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        script = SERVER.format(engine=engine)
        self._command = [sys.executable, "-c", script, str(home), url or ""]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Answers when it listens."""
        self._process = subprocess.Popen([*self._command, str(self.port)])
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self._process.poll() is None, "the server ended by itself"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the server does not listen")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> float:
        """As an operator does; answers how many seconds it took."""
        began = time.monotonic()
        self._process.terminate()
        assert self._process.wait(60) == 0
        return time.monotonic() - began

    def restart(self) -> None:
        self.kill()
        self.start()


@contextmanager
def running(home: Path, engine: str, url: str | None = None) -> Iterator[Server]:
    server = Server(home, engine, url)
    try:
        yield server
    finally:
        server.kill()


async def train(
    server: Server, *, model: str, tenant: int, steps: int, begun: anyio.Event
) -> list[object]:
    """A loop as a user writes it: all that it saw, and at its end the weights' own answer."""
    text = list(f"the quick brown fox {tenant} jumps over".encode())
    datum = Datum(model_input=text[:-1], loss_fn_inputs={"target_tokens": text[1:]})
    seen: list[object] = []
    async with AsyncServiceClient(server.url, api_key=server.keys[tenant]) as service:
        trainer = await service.create_model(model, {"rank": 4, "seed": tenant})
        begun.set()
        for step in range(steps):
            first = trainer.forward_backward([datum], loss_fn="cross_entropy")
            second = trainer.forward_backward([datum, datum], loss_fn="cross_entropy")
            stepped = trainer.optim_step({"learning_rate": 0.01})
            seen += [dict((await first).metrics), dict((await second).metrics)]
            seen.append(dict((await stepped).metrics))
            if step % 4 == 3:
                sampler = await trainer.save_weights_and_get_sampling_client()
                params = {"max_tokens": 6, "seed": step}
                reply = await sampler.sample(ModelInput.from_ints(text[:9]), params, num_samples=2)
                seen += [list(sequence.tokens) for sequence in reply.sequences]
            if step == steps // 2:
                await trainer.save_state("half")
        final = await trainer.forward([datum], loss_fn="cross_entropy")
        seen.append(list(final.loss_fn_outputs[0]["logprobs"].to_numpy()))
        checkpoints = await service.list_checkpoints(trainer.model_id)
        seen.append([(saved.name, saved.step) for saved in checkpoints])
        runs = await service.list_training_runs()
        assert [run.run_id for run in runs] == [trainer.model_id]  # nobody else's
    return seen


async def loops(
    server: Server, fault: Callable[[], None], *, model: str, steps: int, faults: int, seed: int = 0
) -> list[object]:
    """What the tenants saw beside so many faults; `model` may be several, with spaces between."""
    saw: list[object] = [None for _ in TENANTS]
    rng, begun = random.Random(seed), [anyio.Event() for _ in TENANTS]

    async def one(tenant: int) -> None:
        models = model.split()
        mine = models[tenant % len(models)]
        saw[tenant] = await train(
            server, model=mine, tenant=tenant, steps=steps, begun=begun[tenant]
        )

    async with anyio.create_task_group() as tasks:
        for tenant in TENANTS:
            tasks.start_soon(one, tenant)
        for event in begun:
            await event.wait()
        for _ in range(faults):
            await anyio.sleep(rng.uniform(0.2, 0.8))
            assert None in saw, "the loops were over before the fault"
            await anyio.to_thread.run_sync(fault)
    return saw


async def check(home: Path, *, engine: str, model: str, steps: int, kills: int, seed: int) -> None:
    with running(home / "whole", engine) as server:
        expected = await loops(server, server.kill, model=model, steps=steps, faults=0)
    with running(home / "killed", engine) as server:
        saw = await loops(server, server.restart, model=model, steps=steps, faults=kills, seed=seed)
    assert saw == expected


async def test_a_killed_server_is_a_pause(tmp_path: Path) -> None:
    await check(tmp_path, engine=FAKE, model="fake", steps=40, kills=3, seed=0)


async def test_a_server_that_is_stopped_leaves_in_time_and_goes_on_later(tmp_path: Path) -> None:
    with running(tmp_path, FAKE.replace("0.004", "0.2")) as server:
        async with HttpService(server.url, api_key=server.keys[0]) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            steps = [caller.stamp(operation, run) for operation in (GRADIENT, STEP) * 8]
            ids = await caller.send(*steps)
            await caller.result(ids[2])
            assert await anyio.to_thread.run_sync(server.stop) < GRACE_S + 5
            await anyio.to_thread.run_sync(server.start)
            for submission_id in ids:  # an outcome that comes twice is an error there
                await caller.result(submission_id)
            assert (await service.get_run(run)).step == 8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 4))
async def test_a_server_killed_many_times(tmp_path: Path, seed: int) -> None:
    await check(tmp_path, engine=FAKE, model="fake", steps=150, kills=10, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_weights_of_a_real_model_are_bit_identical(tmp_path: Path) -> None:
    await check(tmp_path, engine=TORCH, model="weaver-nano", steps=60, kills=6, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_so_they_are_where_two_base_models_share_room_for_one(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "model")
    engine = BASES.replace("PLACE", repr(str(tmp_path / "model")))
    await check(tmp_path, engine=engine, model="weaver-nano other", steps=16, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_postgresql_that_crashes_is_a_pause(tmp_path: Path, postgres: Postgres) -> None:
    def crash() -> None:
        postgres.stop()
        time.sleep(0.5)
        postgres.start()

    with running(tmp_path / "whole", FAKE) as server:
        expected = await loops(server, crash, model="fake", steps=60, faults=0)
    with running(tmp_path / "away", FAKE, postgres.emptied()) as server:
        assert await loops(server, crash, model="fake", steps=60, faults=3) == expected
