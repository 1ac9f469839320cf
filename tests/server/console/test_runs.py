"""The list of runs in Chromium: a thousand of them, found, turned over and chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.console.browser import CHROMIUM, browsing
from tests.server.console.many import many_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
ROWS = "document.querySelectorAll('tbody tr').length"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("many")
    with many_at(folder) as many, browsing(folder / "profile") as browser:
        yield many.before(browser)


def test_a_thousand_runs_are_listed_a_hundred_at_a_time(many: Site) -> None:
    browser = many.visit("#/runs", key=many.admin)
    browser.see("1 to 100 of 1,000")
    ids = "[...document.querySelectorAll('tbody input')].map(e => e.value)"
    listed = []
    for page in range(1, 11):
        browser.see(f"{100 * page - 99} to {f'{100 * page:,}'} of 1,000")
        assert browser.value(ROWS) == 100
        listed += browser.value(ids)
        browser.value("document.querySelector('[data-step=\"1\"]').click()")
    assert listed == [f"run-{i:012d}" for i in range(1000)], "each once, the latest first"
    assert browser.value("document.querySelector('[data-step=\"1\"]').ariaDisabled") == "true"
    browser = many.visit("#/runs", key=many.admin)
    browser.see("1 to 100 of 1,000")
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
