"""The site: its navigation has every page, its reference every name, and it builds strictly."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest
import yaml

import weaver
from tests.server.console.browser import CHROMIUM, browsing
from tests.server.console.pictures import documents, open_anew
from tests.server.console.test_access import FOUND, RULES
from weaver import errors, types

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MKDOCS = ROOT / ".venv-docs/bin/mkdocs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
JOBS = (
    "Fine-tune on my chats",
    "Reward with a judge",
    "Continue tomorrow",
    "Evaluate",
    "Serve to a team",
    "Export to vLLM",
    "Debug a run that does not learn",
)

LOOKED_AT = ("index", "jobs", "losses", "cli", "gallery", "notebooks/first-fine-tuning")
"""Of each kind of page one: prose, wide code and tables, pictures, a notebook."""


def pages(nav: object) -> Iterator[str]:
    match nav:
        case str():
            yield nav
        case list():
            for one in nav:
                yield from pages(one)
        case dict():
            for one in nav.values():
                yield from pages(one)


def test_the_navigation_has_every_page_once() -> None:
    there = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    assert sorted(pages(CONFIG["nav"])) == sorted(
        str(path.relative_to(DOCS).with_suffix(".md")) for path in there
    )


def test_every_job_is_in_the_navigation_and_has_its_lines() -> None:
    [by_job] = [one["By job"] for one in CONFIG["nav"] if "By job" in one]
    named = [name for one in by_job if isinstance(one, dict) for name in one]
    assert named[: len(JOBS)] == list(JOBS)
    sections = (DOCS / "jobs.md").read_text().split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == [*JOBS, "From Tinker, or TRL"]
    for section in sections:
        assert re.search(r"^```(python|bash)$", section, re.MULTILINE), section


def referred(page: str) -> list[str]:
    text = (DOCS / "reference" / page).read_text()
    return re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def test_the_reference_has_every_public_name() -> None:
    assert referred("types.md") == ["weaver.types"]
    elsewhere = {*types.__all__, *errors.__all__, "types"} - {"WeaverError"}
    shown = {name.removeprefix("weaver.").removeprefix("errors.") for name in referred("weaver.md")}
    assert shown == set(weaver.__all__) - elsewhere
    source = (ROOT / "weaver_rl/__init__.py").read_text()
    modules = re.findall(r"^from (weaver_rl[\w.]+) import \*", source, re.MULTILINE)
    [own] = re.findall(r"^from weaver_rl import (.+)", source, re.MULTILINE)
    modules += [f"weaver_rl.{name}" for name in own.split(", ")]
    assert sorted(referred("weaver_rl.md")) == sorted(modules)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It builds strictly."""
    if not MKDOCS.exists():
        pytest.skip("`make docs` installs mkdocs")
    site = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.mark.slow
def test_it_loads_nothing_from_elsewhere_and_has_what_is_not_in_docs(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        assert [one for one in loaded if re.match(r"(https?:)?//", one)] == [], page
    assert "TrainingClient" in (site / "reference/weaver.html").read_text()
    assert "rl.fine_tune" in (site / "notebooks/first-fine-tuning.html").read_text()
    assert (site / "notebooks/first-fine-tuning.ipynb").exists()
    assert "recipes.sft" in (site / "files/recipes/index.html").read_text()
    assert "checkpoint_mismatch" in (site / "search/search_index.json").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_axe_finds_nothing_and_no_page_scrolls_sideways(site: Path, tmp_path: Path) -> None:
    axe = (files(pytest.importorskip("axe_core_python")) / "axe.min.js").read_text()
    asked = FOUND % json.dumps({"runOnly": RULES, "resultTypes": ["violations"]})
    found = []
    with documents(site) as address, browsing(tmp_path) as browser:
        for page, width, dark in product(LOOKED_AT, (390, 1440), (False, True)):
            browser.screen(width=width, dark=dark, still=True)
            open_anew(browser, f"{address}/{page}.html")
            browser.wait("document.querySelector('.md-search[aria-label]')")
            browser.value(f"{axe}; 0")
            found += [f"{page}, {width}, {dark}: {one}" for one in browser.value(asked)]
            wide = browser.value("document.documentElement.scrollWidth")
            found += [f"{page} is {wide} px wide"] * (wide > width)
        browser.rest()
        found += browser.problems
    assert found == [], "\n".join(found)
