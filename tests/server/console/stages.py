"""Every page of the console with data in it, for the tests of access and for pictures."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import anyio

from tests.contracts.caller import GRADIENT, STEP, Caller
from weaver.client.http import HttpService
from weaver.protocol import CreateModel, GradientsDone, ModelCreated, StepDone
from weaver.types import MetricPoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.console.browser import Browser
    from tests.server.console.site import Site

SUBMIT = "document.querySelector(%s).requestSubmit()"


async def furnish(site: Site) -> tuple[str, str]:
    """A run that looks as a day's work does: its id, and a checkpoint of it."""
    async with HttpService(site.address, api_key=site.alice) as service:
        caller = await Caller.open(service)
        create = CreateModel(base_model="fake", name="reverse-words")
        run = (await caller.do(create, ModelCreated)).run.run_id
        for _ in range(12):
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(STEP, StepDone, run_id=run)
        points = []
        for step in range(1, 81):
            noise = math.sin(7.3 * step) / 12
            values = {
                "reward/mean": 1 - math.exp(-step / 25) + noise,
                "eval/mean": 0.9 - 0.8 * math.exp(-step / 30),
                "rollout/length": 40 + 12 * math.sin(step / 9) + 20 * noise,
                "time/step_s": 3 + noise,
            }
            points += [MetricPoint(name=n, value=v, step=step) for n, v in values.items()]
        await service.log_metrics(run, points)
        return run, await caller.save(run, "sampler", name="step-80")


def stages(site: Site, *, run: str, path: str) -> Iterator[tuple[str, Browser]]:
    """Each page by its name, as soon as it shows what it is to show."""

    def visit(place: str, until: str) -> Browser:
        browser = site.visit(place, key=site.admin)
        browser.wait(until)
        return browser

    yield "runs", visit("#/runs", "document.querySelector('tbody tr')")
    browser = visit(f"#/runs/{run}", "document.querySelectorAll('.curve').length >= 4")
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    yield "run", browser
    yield from dialogs(browser, run)
    over = f"#/runs/{run}?with={site.run}&smooth=0.5"
    yield "compared", visit(over, "document.querySelector('.curve .swatch.tone-1')")
    query = f"a=base:fake&b={path}&max_tokens=420&num_samples=1&seed=1&prompt=Write+a+story."
    browser = visit(f"#/samples?{query}", "document.querySelector('form.sampling')")
    browser.value(SUBMIT % "'form.sampling'")
    browser.wait("document.querySelectorAll('.summary:not(:empty)').length == 2")
    yield "samples", browser
    query = f"a=base:fake&b={path}&max_tokens=120&seed=1&system=Answer+in+one+line."
    browser = visit(f"#/playground?{query}", "document.querySelector('.composer')")
    for turn, text in enumerate(("Which rivers flow north?", "And which of them freeze?"), 1):
        browser.value(f"document.querySelector('.composer textarea').value = {json.dumps(text)}")
        browser.value(SUBMIT % "'.composer'")
        browser.wait(
            f"document.querySelectorAll('article').length == {4 * turn} && "
            "document.querySelector('.composer .primary').disabled === false"
        )
    yield "playground", browser
    yield "load", visit("#/load", "document.querySelectorAll('.curve').length == 3")
    browser = visit("docs", "document.querySelector('details')")
    opened = json.dumps("post-/v1/runs/{run_id}/metrics"), json.dumps("get-/v1/load")
    for name in opened:
        browser.value(f"document.getElementById({name}).open = true")
    browser.wait("document.querySelectorAll('form.try').length == 2")
    browser.value("[...document.querySelectorAll('form.try')].at(-1).requestSubmit()")
    browser.wait("document.querySelector('.answer pre')")
    yield "api", browser
    post = "document.querySelector('form.try[aria-label^=\"Try POST\"]')"
    browser.value(f"{post}.elements[0].value = {json.dumps(run)}; {post}.requestSubmit()")
    browser.wait("document.querySelector('dialog.question')")
    yield "question", browser
    browser = visit("#/runs", "document.querySelector('tbody tr')")
    browser.value("document.getElementById('help').click()")
    yield "shortcuts", browser
    browser = site.visit("#/runs/run-000000000000", key=site.admin)
    browser.see("Go to the runs")
    yield "not-found", browser
    browser.value("document.getElementById('leave').click()")
    browser.see("Open the console")
    yield "key", browser


def dialogs(browser: Browser, run: str) -> Iterator[tuple[str, Browser]]:
    """What the buttons of a run's page ask, and how one says what was refused."""
    shown = "document.querySelector('dialog.ask')"
    browser.value("Object.defineProperty(navigator, 'clipboard', { value: undefined }); 0")
    for act in ("copy", "stop", "delete", "keep", "export", "drop", "rename"):
        browser.value(f"document.querySelector('[data-act={act}]').click()")
        browser.wait(shown)
        yield act, browser
        if act == "rename":
            browser.fill("dialog.ask input", run)
            browser.value(SUBMIT % "'dialog.ask form'")
            browser.wait(f"{shown}.querySelector('.problem')")
            yield "refused", browser
        browser.press("Escape")
        browser.wait(f"!{shown}")


def run_of(site: Site) -> tuple[str, str]:
    return anyio.run(furnish, site)
