"""What the console's buttons do to a run and its checkpoints, in Chromium: each asks before."""

from __future__ import annotations

import json
import tarfile
import time
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest

from tests.contracts.caller import Caller
from tests.server.console.browser import CHROMIUM, WAIT_S
from weaver.client.http import HttpService
from weaver.protocol import CreateModel, ModelCreated

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.console.browser import Browser
    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
DIALOG = "document.querySelector('dialog.ask')"


@pytest.fixture
def run(site: Site) -> str:
    """One with two checkpoints."""

    async def make() -> str:
        async with HttpService(site.address, api_key=site.alice) as service:
            caller = await Caller.open(service)
            made = await caller.do(CreateModel(base_model="fake", name="mine"), ModelCreated)
            for name in ("first", "second"):
                await caller.save(made.run.run_id, "sampler", name=name)
            return made.run.run_id

    return anyio.run(make)


def ask(site: Site, path: str) -> httpx.Response:
    return httpx.get(f"{site.address}/v1/{path}", headers={"Authorization": f"Bearer {site.alice}"})


def visit(site: Site, run: str) -> Browser:
    browser = site.visit(f"#/runs/{run}")
    browser.wait("document.querySelectorAll('[data-act=drop]').length == 2")
    return browser


def click(browser: Browser, act: str, path: str = "") -> None:
    place = f"[data-act={act}]" + (f"[data-path={json.dumps(path)}]" if path else "")
    button = f"document.querySelector({json.dumps(place)})"
    browser.value(f"{button}.focus(); {button}.click()")


def agree(browser: Browser) -> None:
    browser.wait(DIALOG)
    browser.value(f"{DIALOG}.querySelector('form').requestSubmit()")


def test_a_dialog_is_left_without_anything_done(site: Site, run: str) -> None:
    browser = visit(site, run)
    for act in ("rename", "stop", "delete", "drop", "keep", "export"):
        click(browser, act)
        browser.wait(f"{DIALOG}?.contains(document.activeElement)")
        assert browser.value(f"{DIALOG}.querySelector('p strong').textContent")
        browser.press("Escape")
        browser.wait(f"!{DIALOG}")
        assert browser.value("document.activeElement.dataset.act") == act, "the focus comes back"
    assert ask(site, f"runs/{run}").json()["status"] == "idle"
    assert len(ask(site, f"checkpoints?run_id={run}").json()) == 2


def test_a_run_is_renamed_and_a_refusal_is_shown_in_words(site: Site, run: str) -> None:
    browser = visit(site, run)
    click(browser, "rename")
    browser.wait(DIALOG)
    browser.fill("dialog.ask input", run)
    agree(browser)
    browser.wait(f"{DIALOG}.querySelector('[role=alert]').textContent")
    refusal = httpx.patch(
        f"{site.address}/v1/runs/{run}",
        json={"name": run},
        headers={"Authorization": f"Bearer {site.alice}"},
    ).json()["error"]
    assert f"name: {refusal['message']}" in browser.text() and refusal["hint"] in browser.text()
    browser.fill("dialog.ask input", "better")
    agree(browser)
    browser.see("It is called better now.")
    browser.wait("document.querySelector('h1').textContent == 'better'")
    assert ask(site, f"runs/{run}").json()["name"] == "better"


def test_a_run_is_stopped_and_then_cannot_be(site: Site, run: str) -> None:
    browser = visit(site, run)
    click(browser, "stop")
    agree(browser)
    browser.see("It is stopped at step 0.")
    browser.wait("document.querySelector('[data-act=stop]').ariaDisabled == 'true'")
    assert ask(site, f"runs/{run}").json()["status"] == "stopped"
    click(browser, "stop")
    browser.see("It is stopped already.")
    assert not browser.value(DIALOG)


def test_a_checkpoint_is_kept_for_a_while_and_deleted(site: Site, run: str) -> None:
    browser = visit(site, run)
    path, other = (f"weaver://{run}/sampler/{name}" for name in ("first", "second"))
    click(browser, "keep", path)
    browser.wait(DIALOG)
    browser.value(f"{DIALOG}.querySelector('select').value = '604800'")
    agree(browser)
    browser.see("first is kept for 7 days.")
    browser.wait("document.querySelectorAll('td time[title]').length >= 3")
    info = ask(site, f"checkpoints/info?path={path}").json()
    assert info["ttl_seconds"] == 604_800
    click(browser, "drop", path)
    agree(browser)
    browser.see("first is deleted.")
    browser.wait("document.querySelectorAll('[data-act=drop]').length == 1")
    assert [one["path"] for one in ask(site, f"checkpoints?run_id={run}").json()] == [other]


def test_a_path_is_copied_or_shown_where_the_browser_lets_no_page_write(
    site: Site, run: str
) -> None:
    browser = visit(site, run)
    path = f"weaver://{run}/sampler/first"
    stub = "Object.defineProperty(navigator, 'clipboard', {configurable: true, value: %s})"
    browser.value(stub % "{ writeText: async (text) => { window.copied = text; } }" + "; 0")
    click(browser, "copy", path)
    browser.see(f"{path} is copied.")
    assert browser.value("window.copied") == path
    browser.value(stub % "undefined" + "; 0")
    click(browser, "copy", path)
    browser.wait(DIALOG)
    assert browser.value(f"{DIALOG}.querySelector('input').value") == path
    assert browser.value("getSelection().toString()") == path


def test_an_export_is_downloaded_as_an_archive(site: Site, run: str, tmp_path: Path) -> None:
    browser = visit(site, run)
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    click(browser, "export", f"weaver://{run}/sampler/second")
    agree(browser)
    browser.see("second is being downloaded")
    archive, end = tmp_path / f"{run}-second.tar", time.monotonic() + WAIT_S
    while not archive.exists():
        assert time.monotonic() < end, list(tmp_path.iterdir())
        time.sleep(0.05)
    with tarfile.open(archive) as files:
        names = {member.name for member in files.getmembers()}
    export = ask(site, f"checkpoints/export?path=weaver://{run}/sampler/second").json()
    assert names == {file["name"] for file in export["files"]}


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_run_is_deleted_with_its_checkpoints_if_that_is_ticked(
    site: Site, run: str, checkpoints: bool
) -> None:
    browser = visit(site, run)
    click(browser, "delete")
    browser.wait(DIALOG)
    browser.see("Delete its 2 checkpoints, too")
    if checkpoints:
        browser.value(f"{DIALOG}.querySelector('[type=checkbox]').click()")
    agree(browser)
    browser.wait("location.hash == '#/runs'")
    browser.see("Last activity")
    assert ask(site, f"runs/{run}").status_code == 404
    left = [one for one in ask(site, "checkpoints").json() if one["run_id"] == run]
    assert len(left) == (0 if checkpoints else 2)


def test_nobody_deletes_what_is_gone(site: Site, run: str) -> None:
    browser = visit(site, run)
    path = f"weaver://{run}/sampler/first"
    click(browser, "drop", path)
    browser.wait(DIALOG)
    headers = {"Authorization": f"Bearer {site.alice}"}
    httpx.delete(f"{site.address}/v1/checkpoints?path={path}", headers=headers)
    agree(browser)
    browser.wait(f"{DIALOG}.querySelector('.problem')")
    assert path in browser.value(f"{DIALOG}.querySelector('.problem').textContent")
    browser.press("Escape")
    browser.wait("document.querySelectorAll('[data-act=drop]').length == 1")
