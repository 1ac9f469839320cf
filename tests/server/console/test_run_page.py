"""A run's curves in Chromium: grouped, found, smoothed, laid over another's, read, and legible."""

from __future__ import annotations

import json
import random
from importlib import resources
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import Caller
from tests.server.console.browser import CHROMIUM
from weaver.client.http import HttpService
from weaver.protocol import CreateModel, ModelCreated
from weaver.types import MetricPoint

if TYPE_CHECKING:
    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
LONG = "off_policy/importance_weight_maximum_over_all_tokens_of_a_step"
NAMES = "[...document.querySelectorAll('.curve strong')].map(e => e.textContent)"
LOOSE = """[...document.querySelectorAll('.curve')].flatMap(curve => {
  const frame = curve.getBoundingClientRect();
  const labels = 'strong, .swatch, .value, .best, .plot span, .steps span';
  const boxes = [...curve.querySelectorAll(labels)].filter(e => e.textContent)
    .map(e => [e, e.getBoundingClientRect()]);
  const out = boxes.filter(([e, b]) => b.left < frame.left || b.right > frame.right + 0.5
    || b.bottom > frame.bottom || e.scrollWidth > e.clientWidth + 1 && e.clientWidth);
  const over = boxes.filter(([, a], i) => boxes.some(([, b], j) => j < i && a.left < b.right - 0.5
    && b.left < a.right - 0.5 && a.top < b.bottom - 0.5 && b.top < a.bottom - 0.5));
  return [...out, ...over].map(([e]) => curve.innerText + ': ' + e.textContent);
})"""
"""Labels of curves that are cut, leave their frame or lie over each other."""


@pytest.fixture(scope="module")
def run(shared: Site) -> str:
    """A run with metrics of many prefixes and sizes."""

    async def make() -> str:
        async with HttpService(shared.address, api_key=shared.alice) as service:
            caller = await Caller.open(service)
            made = await caller.do(CreateModel(base_model="fake", name="many curves"), ModelCreated)
            logged = {
                "reward/mean": [0.1, 0.9, 0.4, 0.6],
                "eval/mean": [0.2, 0.3, 0.2, 0.1],
                "train/loss": [3.0, 1.0, 2.0, 1.5],
                "train/entropy": [-1.234e-9, -1.235e-9, -1.3e-9, -1.2e-9],
                LONG: [-12345678.9, 98765432.1, 5.0, -987654321.25],
                "own": [1.0, 1.0, 1.0, 1.0],
            }
            points = [
                MetricPoint(name=name, value=value, step=123_456 + i)
                for name, values in logged.items()
                for i, value in enumerate(values)
            ]
            await service.log_metrics(made.run.run_id, points)
            return made.run.run_id

    return anyio.run(make)


def test_curves_are_grouped_by_prefix_and_found_by_words(site: Site, run: str) -> None:
    browser = site.visit(f"#/runs/{run}")
    browser.wait("document.querySelectorAll('.curve').length == 6")
    titles = "[...document.querySelectorAll('[aria-labelledby=curves] h3')].map(e => e.innerText)"
    assert browser.value(titles) == ["reward", "eval", "Logged", "train", "off_policy"]
    browser.press("/")
    browser.send("Input.insertText", text="LOSS train")
    browser.wait("document.querySelectorAll('.curve').length == 1")
    assert browser.value(NAMES) == ["train/loss"] and browser.value(titles) == ["train"]
    assert browser.value("location.hash") == f"#/runs/{run}?find=LOSS+train"
    browser = site.visit(f"#/runs/{run}?find=nothing")
    browser.see("No curve has this in its name.")
    browser = site.visit(f"#/runs/{site.run}")
    browser.wait("document.querySelectorAll('.curve').length >= 4")
    assert browser.value(titles)[-2:] == ["forward backward", "optim step"]


def test_the_best_and_the_last_value_are_shown_and_reached_by_key(site: Site, run: str) -> None:
    browser = site.visit(f"#/runs/{run}?find=train/loss")
    browser.wait("document.querySelectorAll('.curve').length == 1")
    browser.press("j")
    told = browser.value("document.activeElement.getAttribute('aria-label')")
    assert "1.5 at step 123,459, best 1 at step 123,457" in told
    value = "document.querySelector('.value').textContent"
    for key, words in (
        ("b", "step 123,457: 1"),
        ("End", "step 123,459: 1.5"),
        ("Home", "step 123,456: 3"),
    ):
        browser.press(key)
        assert browser.value(value) == words
    browser.value("document.querySelector('#filter').focus()")
    browser.fill("#filter", "reward")
    browser.see("best 0.9 at step 123,457")
    browser.fill("#filter", "own")
    browser.wait(f"{NAMES}.length == 1")
    assert browser.value("document.querySelectorAll('.best').length") == 0, "nobody knows which way"


def test_curves_are_smoothed_as_in_the_report(site: Site, run: str) -> None:
    browser = site.visit(f"#/runs/{run}?smooth=0.6&find=reward")
    browser.wait("document.querySelectorAll('.curve .faint').length == 1")
    assert browser.value("document.querySelector('#smooth').value") == "0.6"
    assert browser.value("document.querySelector('.value').textContent") == "0.5449"
    control = ["min", "max", "step"]
    found = {name: browser.value(f"document.querySelector('#smooth').{name}") for name in control}
    report = (resources.files("weaver_rl") / "templates" / "report.html").read_text()
    assert 'type="range" min="0" max="0.95" step="0.05"' in report
    assert found == {"min": "0", "max": "0.95", "step": "0.05"}
    source = (resources.files("weaver_rl") / "templates" / "curves.js").read_text()
    theirs = source[source.index("function smoothed") : source.index("function ticks")]
    values = [random.Random(0).gauss(0, 1) for _ in range(50)]
    mine = f"""import('./console/chart.js').then(({{ smoothed }}) =>
        smoothed({json.dumps(list(enumerate(values)))}, 0.85).map(([, value]) => value))"""
    expected = browser.value(f"{theirs}; smoothed({json.dumps(values)}, 0.85)")
    assert browser.value(mine) == pytest.approx(expected, rel=1e-12)
    smooth = "document.querySelector('#smooth')"
    browser.value(f"{smooth}.value = 0; {smooth}.dispatchEvent(new Event('input'))")
    browser.wait("document.querySelectorAll('.curve .faint').length == 0")
    assert browser.value("location.hash") == f"#/runs/{run}?find=reward"


def test_two_runs_are_laid_over_each_other_by_an_address(site: Site, run: str) -> None:
    browser = site.visit(f"#/runs/{run}?with={site.run},run-000000000000&find=reward")
    browser.wait("document.querySelectorAll('.curve').length == 2")
    browser.see("run-000000000000 is not found")
    lines = "[...document.querySelectorAll('.curve')].map(e => e.querySelectorAll('.line').length)"
    assert browser.value(lines) == [1, 1], "each run has a reward of another name"
    site.metrics(MetricPoint(name="reward/mean", value=0.5, step=123_457))
    browser.wait("document.querySelectorAll('.curve .line').length == 3")
    strokes = "[...document.querySelectorAll('.line')].map(e => getComputedStyle(e).stroke)"
    assert len(set(browser.value(strokes))) == 2
    browser.press("j")
    browser.press("j")
    browser.press("End")
    values = "[...document.activeElement.querySelectorAll('.value')].map(e => e.textContent)"
    assert browser.value(values) == ["step 123,459: 0.6", "step 123,457: 0.5"]
    browser.press("Home")
    assert browser.value(values) == ["step 123,456: 0.1", "–"], "it had not begun"
    browser.value("document.querySelector('.legend [aria-label^=\"Leave out run-0\"]').click()")
    browser.wait("document.querySelectorAll('.legend [aria-label^=\"Leave out\"]').length == 1")
    assert "find=reward" in browser.value("location.hash")
    browser.value("document.querySelector('.legend [aria-label^=\"Leave out\"]').click()")
    browser.see("Compare with other runs")


@pytest.mark.parametrize("width", [390, 1440])
def test_every_label_of_a_curve_fits(site: Site, run: str, width: int) -> None:
    for place in (f"{run}?smooth=0.5", f"{run}?with={site.run}"):
        browser = site.visit(f"#/runs/{place}", key=site.admin)
        browser.screen(width=width)
        browser.wait("document.querySelectorAll('.curve').length >= 6")
        assert browser.value(LOOSE) == []
        browser.press("j")
        browser.press("ArrowLeft")
        assert browser.value("document.querySelectorAll('.curve.reading').length") == 1
        assert browser.value(LOOSE) == []
        assert browser.value("document.documentElement.scrollWidth") <= width
