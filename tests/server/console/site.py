"""`Site`: a server on a socket with a run in it, before a browser; for the tests of the pages."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from tests.contracts.caller import BAD_GRADIENT, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.console.browser import browsing
from tests.server.http.helpers import serving
from weaver.client.http import HttpService
from weaver.protocol import CreateModel, GradientsDone, ModelCreated, SaveCheckpoint, StepDone
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.server.settings import ServerSettings
from weaver.types import MetricPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.server.console.browser import Browser

HOSTILE = '<img src=x onerror="window.hostile=1"><script>window.hostile=1</script>'


@dataclass(frozen=True)
class Site:
    address: str
    alice: str
    """A key, as is the next."""
    admin: str
    run: str
    paths: tuple[str, ...]
    browser: Browser
    engine: FakeEngine

    def visit(self, place: str, *, key: str | None = None) -> Browser:
        """Opens a page anew, with a key in the tab."""
        self.browser.screen()
        self.browser.open("about:blank")
        self.browser.open(f"{self.address}/console/icon.svg")
        self.browser.wait("location.pathname.endsWith('icon.svg')")
        secret = json.dumps(self.alice if key is None else key)
        self.browser.value(f"sessionStorage.setItem('weaver-api-key', {secret})")
        self.browser.open(f"{self.address}/{place}")
        return self.browser

    def metrics(self, *points: MetricPoint) -> None:
        async def log() -> None:
            async with HttpService(self.address, api_key=self.alice) as service:
                await service.log_metrics(self.run, points)

        anyio.run(log)


async def settle(address: str, key: str) -> tuple[str, tuple[str, ...]]:
    """A run of three steps with a hostile name, metrics and two checkpoints."""
    async with HttpService(address, api_key=key) as service:
        caller = await Caller.open(service)
        create = CreateModel(base_model="fake", user_metadata={"name": HOSTILE, HOSTILE: HOSTILE})
        run = (await caller.do(create, ModelCreated)).run.run_id
        paths = []
        for step in range(1, 4):
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(STEP, StepDone, run_id=run)
            points = [MetricPoint(name=n, value=step / 10, step=step) for n in ("reward", HOSTILE)]
            await service.log_metrics(run, points)
            paths.append(await caller.save(run, "sampler", name=f"step-{step}"))
        await caller.refused(BAD_GRADIENT, run_id=run)
        save = SaveCheckpoint(purpose="state", name="short", ttl_seconds=90_000)
        await caller.result(await caller.start(save, run))
    return run, tuple(paths)


@contextmanager
def site_at(
    folder: Path, *, hook: Callable[[str, object], None] = lambda name, argument: None
) -> Iterator[Site]:
    database = open_database(folder / "home")
    keys = Keys(database)
    alice, admin = keys.create("alice")[1], keys.create("ops", admin=True)[1]
    database.dispose()
    settings = ServerSettings(home=folder / "home", port=0)
    engine = FakeEngine(hook=hook)
    with (
        serving(engine, settings) as server,
        browsing(folder / "profile") as browser,
    ):
        run, paths = anyio.run(settle, server.address, alice)
        yield Site(server.address, alice, admin, run, paths, browser, engine)
