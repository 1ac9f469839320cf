"""One server and one browser for all tests of the pages in a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.console.browser import CHROMIUM
from tests.server.console.site import site_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.console.site import Site


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with site_at(tmp_path_factory.mktemp("console")) as site:
        yield site


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """Fails a test in which the browser's console has had anything to say, or a script has run."""
    shared.browser.problems.clear()
    yield shared
    assert shared.browser.value("window.hostile") is None
    shared.browser.rest()
    refusals = ("401", "403", "404", "422")  # which the browser itself writes down
    assert [p for p in shared.browser.problems if not any(f"of {n}" in p for n in refusals)] == []
