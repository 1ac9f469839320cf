"""How long a list of 1,000 runs takes in the console: the server alone, and with the page.

The page needs Chromium, and is left out without it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tests.benchmarks.figures import Figure
from tests.server.console.browser import CHROMIUM, browsing
from tests.server.console.many import RUNS, SHOWN, many_at

if TYPE_CHECKING:
    from collections.abc import Iterator

VISIT = """(async () => {
  location.hash = '#/load';
  const rows = () => document.querySelectorAll('tbody .row').length;
  while (rows()) await new Promise(requestAnimationFrame);
  const begin = performance.now();
  location.hash = '#/runs';
  while (rows() < 100) await new Promise(requestAnimationFrame);
  document.querySelector('tbody').getBoundingClientRect();
  return performance.now() - begin;
})()"""
"""Milliseconds from asking for the list until it is laid out: of server and page together."""


def figures(smoke: bool) -> Iterator[Figure]:
    count, rounds = (SHOWN, 2) if smoke else (RUNS, 9)
    with tempfile.TemporaryDirectory() as folder, many_at(Path(folder), count) as many:
        headers = {"Authorization": f"Bearer {many.admin}"}
        answered = []
        with httpx.Client(base_url=many.address, headers=headers) as http:
            for _ in range(rounds):
                begin = time.perf_counter()
                http.get("/v1/overview").raise_for_status()
                answered.append(1e3 * (time.perf_counter() - begin))
        yield Figure(f"the first {SHOWN} of {count:,} runs, by the server", tuple(answered), "ms")
        if CHROMIUM is None:
            return
        with browsing(Path(folder) / "profile") as browser:
            site = many.before(browser)
            site.visit("#/runs", key=site.admin).see("of 1,000" if not smoke else "100 runs")
            shown = tuple(browser.value(VISIT) for _ in range(rounds))
        yield Figure(f"{count:,} runs listed in the console", shown, "ms", at_most=1000)
