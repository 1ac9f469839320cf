"""How long a list of 1,000 runs takes in the console: the server alone, and with the page.

The page needs Chromium, and one of the servers PostgreSQL; what is not installed is left out.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tests.benchmarks.figures import Figure
from tests.postgres import Postgres, programs
from tests.server.console.browser import CHROMIUM, browsing
from tests.server.console.many import RUNS, SHOWN, many_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.console.many import Many

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


def answered(many: Many, rounds: int) -> tuple[float, ...]:
    """Milliseconds of each request for the first page."""
    took = []
    headers = {"Authorization": f"Bearer {many.admin}"}
    with httpx.Client(base_url=many.address, headers=headers) as http:
        for _ in range(rounds):
            begin = time.perf_counter()
            http.get("/v1/overview").raise_for_status()
            took.append(1e3 * (time.perf_counter() - begin))
    return tuple(took)


def figures(smoke: bool) -> Iterator[Figure]:
    count, rounds = (SHOWN, 2) if smoke else (RUNS, 9)
    with tempfile.TemporaryDirectory() as folder, many_at(Path(folder), count) as many:
        yield Figure(f"{SHOWN} of {count:,} runs, SQLite", answered(many, rounds), "ms")
        if CHROMIUM is not None:
            with browsing(Path(folder) / "profile") as browser:
                site = many.before(browser)
                site.visit("#/runs", key=site.admin).see("of 1,000" if not smoke else "100 runs")
                shown = tuple(browser.value(VISIT) for _ in range(rounds))
            yield Figure(f"{count:,} runs listed in the console", shown, "ms", at_most=1000)
    if (found := programs()) is not None:
        server = Postgres(found)
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                many_at(Path(folder), count, server.emptied()) as many,
            ):
                yield Figure(f"{SHOWN} of {count:,} runs, PostgreSQL", answered(many, rounds), "ms")
        finally:
            server.close()
