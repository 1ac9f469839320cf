"""The API page sends requests: at once, behind a question, or says why it cannot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.server.console.browser import CHROMIUM

if TYPE_CHECKING:
    from tests.server.console.browser import Browser
    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def unfold(browser: Browser, route: str) -> str:
    """The route's place in the page, in JavaScript."""
    browser.wait("document.querySelector('details')")
    place = f"document.getElementById({json.dumps(route)})"
    browser.value(f"{place}.open = true")
    browser.wait(f"{place}.innerText.includes('Try it')")
    return place


def logged(site: Site) -> str:
    headers = {"Authorization": f"Bearer {site.alice}"}
    return httpx.get(f"{site.address}/v1/runs/{site.run}/metrics", headers=headers).text


def test_a_get_is_sent_at_once_with_the_tabs_key(site: Site) -> None:
    browser = site.visit("docs")
    place = unfold(browser, "get-/v1/runs/{run_id}/curves")
    browser.wait(f"{place}.querySelector('form')")
    browser.value(f"{place}.querySelector('form').requestSubmit()")
    assert browser.value(f"{place}.querySelector('.answer').innerText") == "", "a run is required"
    browser.value(f"{place}.querySelector('[name=\"path:run_id\"]').value = '{site.run}'")
    assert browser.value(f"{place}.querySelector('[name=\"query:points\"]').value") == "400"
    browser.value(f"{place}.querySelector('[name=\"query:points\"]').value = '2'")
    browser.value(f"{place}.querySelector('form').requestSubmit()")
    browser.wait(f"{place}.querySelector('.answer pre')")
    curves = json.loads(browser.value(f"{place}.querySelector('.answer pre').textContent"))
    assert curves and all(len(curve["points"]) <= 2 for curve in curves)
    line = browser.value(f"{place}.querySelector('.answer p').textContent")
    assert line.startswith("200 OK, ") and " ms, " in line
    browser.value(f"{place}.querySelector('[name=\"query:points\"]').value = 'many'")
    browser.value(f"{place}.querySelector('form').requestSubmit()")
    browser.wait(f"{place}.querySelector('.answer').innerText.includes('422 ')")
    assert "points" in browser.value(f"{place}.querySelector('.answer pre').textContent")


def test_what_changes_something_is_asked_for_first(site: Site) -> None:
    browser = site.visit("docs")
    place = unfold(browser, "post-/v1/runs/{run_id}/metrics")
    browser.wait(f"{place}.querySelector('form')")
    body = f"{place}.querySelector('[name=body]')"
    [point] = json.loads(browser.value(f"{body}.value"))["points"]
    assert set(point) == {"name", "value"}
    browser.value(f"{place}.querySelector('[name=\"path:run_id\"]').value = '{site.run}'")
    points = {"points": [{"name": "tried", "value": 1.5, "step": 1}]}
    browser.value(f"{body}.value = '[1,'; {place}.querySelector('form').requestSubmit()")
    browser.see("The body is not JSON")
    assert not browser.value("document.querySelector('dialog')")
    browser.value(f"{body}.value = {json.dumps(json.dumps(points))}")
    browser.value(f"{place}.querySelector('form').requestSubmit()")
    browser.wait("document.querySelector('dialog')?.open")
    browser.see(f"POST /v1/runs/{site.run}/metrics changes what is on the server.")
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog')")
    assert "tried" not in logged(site)
    browser.value(f"{place}.querySelector('form').requestSubmit()")
    browser.wait("document.querySelector('dialog')?.open")
    browser.value("document.querySelector('dialog .primary').click()")
    browser.wait(f"{place}.querySelector('.answer').innerText.startsWith('204')")
    assert "tried" in logged(site)


def test_what_is_binary_says_that_it_cannot_be_tried(site: Site) -> None:
    browser = site.visit("docs")
    for route, words in (
        ("post-/v1/sessions/{session_id}/submissions", "It takes application/vnd.weaver"),
        ("get-/v1/checkpoints/export/file", "It answers application/octet-stream"),
        ("get-/v1/sessions/{session_id}/stream/{submission_id}", "It answers a stream"),
    ):
        place = unfold(browser, route)
        browser.see(words)
        assert not browser.value(f"{place}.querySelector('form')")


def test_every_route_has_a_form_or_a_reason(site: Site) -> None:
    browser = site.visit("docs")
    browser.wait("document.querySelector('details')")
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    browser.wait(
        "[...document.querySelectorAll('details')].every(e => "
        "e.querySelector('form.try') || e.innerText.includes('cannot be tried on this page'))"
    )
    bodies = "[...document.querySelectorAll('form.try [name=body]')].map(e => e.value)"
    assert len([json.loads(text) for text in browser.value(bodies)]) >= 6
