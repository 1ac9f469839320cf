"""Whether people can use the pages: axe finds nothing on any of them, and nothing moves unasked."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest

from tests.server.console.browser import CHROMIUM
from tests.server.console.stages import run_of, stages

if TYPE_CHECKING:
    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
RULES = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
FOUND = (
    "axe.run(document, %s).then(r => [...r.violations.flatMap(v => v.nodes.map(n => "
    "`${v.id}: ${n.target} ${n.failureSummary}`)), "
    "...r.incomplete.filter(v => !v.nodes.length).map(v => `${v.id} could not be looked for`)])"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_axe_finds_nothing_on_any_page(site: Site) -> None:
    axe = pytest.importorskip("axe_core_python")
    script = (files(axe) / "axe.min.js").read_text()
    asked = FOUND % json.dumps({"runOnly": RULES, "resultTypes": ["violations"]})
    run, path = run_of(site)
    seen, found = [], []
    for name, browser in stages(site, run=run, path=path):
        browser.value(f"{script}; 0")
        for width in (390, 1440):
            for dark in (False, True):
                browser.screen(width=width, dark=dark, still=True)
                found += [f"{name}, {width}, {dark}: {one}" for one in browser.value(asked)]
                wide = browser.value("document.documentElement.scrollWidth")
                found += [f"{name} is {wide} px wide"] * (wide > width)
        if browser.value("document.getAnimations().length"):
            found.append(f"{name} moves")
        seen.append(name)
    assert found == []
    assert len(seen) == 19
    site.browser.value("document.querySelector('h1').style.color = '#444'")
    [fault] = site.browser.value(asked)
    assert fault.startswith("color-contrast"), "what has a fault is found"
