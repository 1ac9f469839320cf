"""The list of runs in Chromium: a thousand of them, found, turned over and chosen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.fake_engine import FakeEngine
from tests.server.console.browser import CHROMIUM, browsing
from tests.server.console.site import Site
from tests.server.http.helpers import serving
from weaver import wire
from weaver.server import tables
from weaver.server.database import open_database
from weaver.server.keys import Keys
from weaver.server.settings import ServerSettings
from weaver.types import LoraConfig, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
RUNS, LOGGED = 1000, 200
ROWS = "document.querySelectorAll('tbody tr').length"
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


def fill(home: Path) -> tuple[str, str]:
    """A home with many runs of two projects; answers the keys of one and of an administrator."""
    database = open_database(home)
    keys = Keys(database)
    alice, admin = keys.create("alice")[1], keys.create("ops", admin=True)[1]
    model = wire.encode(FakeEngine().get_model("fake"))
    now, runs, owners, metrics = datetime.now(UTC), [], [], []
    for i in range(RUNS):
        id, project = f"run-{i:012d}", "alice" if i % 2 else "bob"
        run = TrainingRun(
            run_id=id,
            name=f"sweep {i}",
            base_model="fake",
            training_mode="lora",
            lora_config=LoraConfig(rank=8),
            step=LOGGED,
            status="idle",
            created_at=now - timedelta(days=1),
            last_request_at=now - timedelta(minutes=i),
            project=project,
        )
        row = {"run_id": id, "description": wire.encode(run), "model": model, "seed": 0}
        runs.append({**row, "snapshot": 0, "project": project, "name": run.name})
        owners.append({"run_id": id, "project": project})
        point = {"run_id": id, "name": "reward/mean"}
        metrics += [{**point, "value": i / RUNS, "step": step} for step in range(LOGGED)]
    with database.begin() as connection:
        for table, rows in ((tables.runs, runs), (tables.owners, owners)):
            connection.execute(table.insert(), rows)
        connection.execute(tables.metrics.insert(), metrics)
    database.dispose()
    return alice, admin


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("many")
    alice, admin = fill(folder / "home")
    engine, settings = FakeEngine(), ServerSettings(home=folder / "home", port=0)
    with (
        serving(engine, settings) as server,
        browsing(folder / "profile") as browser,
    ):
        yield Site(server.address, alice, admin, "run-000000000001", (), browser, engine)


def test_a_thousand_runs_are_listed_within_a_second(many: Site) -> None:
    browser = many.visit("#/runs", key=many.admin)
    browser.see("1 to 100 of 1,000")
    took_ms = min(browser.value(VISIT) for _ in range(5))
    assert took_ms < 1000, took_ms
    head = browser.value("[...document.querySelectorAll('th')].map(e => e.textContent)")
    assert head == [
        "Run",
        "Project",
        "Base model",
        "Steps",
        "Reward or loss",
        "Tokens/s",
        "State",
        "Last activity",
        "Compare",
    ]
    cells = "[...document.querySelector('tbody tr:nth-child(3)').cells].map(e => e.innerText)"
    assert browser.value(cells)[:5] == [
        "sweep 2\nrun-000000000002",
        "bob",
        "fake",
        "200",
        "0.002\nreward/mean",
    ]


def test_the_list_is_found_and_turned_over_and_its_address_says_so(many: Site) -> None:
    browser = many.visit("#/runs?page=2", key=many.admin)
    browser.see("101 to 200 of 1,000")
    browser.value("document.querySelector('[data-step=\"1\"]').click()")
    browser.see("201 to 300 of 1,000")
    assert browser.value("location.hash") == "#/runs?page=3"
    browser.fill("#filter", "BOB sweep 99")
    browser.see("5 runs")  # 990, 992, 994, 996, 998
    assert browser.value(ROWS) == 5


def test_a_project_sees_its_own_and_compares_those_that_it_ticks(many: Site) -> None:
    browser = many.visit("#/runs")
    browser.see("1 to 100 of 500")
    assert "Project" not in browser.text() and "Tick two runs" in browser.text()
    tick = "document.querySelector('[value=run-00000000000%d]').click()"
    browser.value(tick % 1)
    browser.value(tick % 3)
    browser.see("Compare 2 runs")
    browser.fill("#filter", "sweep 5")
    browser.see("Compare 2 runs")
    browser.wait("!document.querySelectorAll('tbody :checked').length")
    browser.fill("#filter", "run-000000000003")
    browser.wait("document.querySelectorAll('tbody :checked').length == 1")
    browser.value("document.querySelector('.foot a').click()")
    browser.wait("document.querySelectorAll('.curve .swatch').length == 2")
    assert browser.value("location.hash") == "#/runs/run-000000000001?with=run-000000000003"
