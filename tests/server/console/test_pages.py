"""The console in a real browser, before a server on a socket: what is seen, and what is not run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import httpx
import pytest

from tests.contracts.caller import Caller
from tests.server.console.browser import CHROMIUM, browsing
from tests.server.console.site import HOSTILE
from weaver import ServiceClient
from weaver.client.http import HttpService
from weaver.engine.status import EngineStatus, GroupStatus, PoolStatus, RankStatus, SamplerStatus
from weaver.protocol import Sample, Sampled
from weaver.types import AdamParams, Datum, MetricPoint, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
ANSWERED = ("loss", "loss_sum", "num_tokens", "weight_sum", "grad_norm", "learning_rate")
NAMED = {"button", "link", "textbox", "searchbox", "combobox", "spinbutton", "checkbox", "dialog"}


def test_a_wrong_key_is_rejected_and_a_right_one_opens(site: Site) -> None:
    browser = site.visit("#/runs", key="wv-wrong")
    browser.see("The key was rejected: the API key is unknown or was revoked.")
    assert browser.value("document.activeElement.id") == "key"
    browser.fill("#key", "schlüssel")
    browser.press("Enter")
    browser.see("characters that no key has")
    browser.fill("#key", site.alice)
    browser.press("Enter")
    browser.see("Last activity")
    assert site.alice not in browser.value("document.documentElement.outerHTML + location.href")
    assert browser.value("localStorage.length + document.cookie.length") == 0
    browser.value("document.querySelector('#leave').click()")
    browser.see("API key")
    assert browser.value("sessionStorage.length") == 0 and site.run not in browser.text()


def test_hostile_names_are_only_text(site: Site) -> None:
    browser = site.visit("#/runs")
    browser.see(HOSTILE)
    browser = site.visit(f"#/runs/{site.run}")
    browser.wait("document.querySelectorAll('.curve').length >= 4")
    assert browser.value("document.querySelector('h1').textContent") == HOSTILE
    assert browser.value("document.querySelectorAll('.facts dt').length") == 7
    titles = "[...document.querySelectorAll('figcaption strong')].map(e => e.textContent)"
    assert HOSTILE in browser.value(titles)
    browser = site.visit(f"#/samples?prompt={HOSTILE}&a={HOSTILE}")
    browser.wait("document.querySelector('textarea')")
    assert browser.value("document.querySelector('textarea').value") == HOSTILE
    assert browser.value("document.querySelectorAll('main img, main script').length") == 0


def test_the_keyboard_reaches_everything(site: Site) -> None:
    browser = site.visit("#/runs")
    browser.see(HOSTILE)
    focus = "document.activeElement"
    browser.press("Tab")
    assert browser.value(f"{focus}.id") == "skip"
    assert browser.value(f"getComputedStyle({focus}).outlineStyle") == "solid"
    assert browser.value(f"{focus}.getBoundingClientRect().left") >= 0
    browser.press("Enter")
    assert browser.value(f"{focus}.id") == "main" and browser.value("location.hash") == "#/runs"
    browser.press("/")
    assert browser.value(f"{focus}.id") == "filter"
    browser.send("Input.insertText", text="no such run")
    browser.see("No run has this")
    browser.fill("#filter", site.run)
    browser.see(HOSTILE)
    browser.value(f"{focus}.blur()")
    browser.press("j")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('.curve').length >= 4")
    assert browser.value("location.hash") == f"#/runs/{site.run}"
    browser.press("j")
    reading = f"{focus}.querySelector('.value').textContent"
    assert browser.value(reading) == "0.3"
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.value(reading) == "step 2: 0.2"
    browser.press("?")
    assert browser.value("document.querySelector('dialog').open")
    browser.press("Enter")
    browser.wait("!document.querySelector('dialog').open")
    browser.press("?")
    browser.press("Escape")
    browser.wait("!document.querySelector('dialog').open")
    browser.press("g")
    browser.press("s")
    browser.see("The same prompt and seed")
    assert browser.value("document.title") == "Samples · Weaver"


def test_a_run_shows_its_curves_operations_and_checkpoints(site: Site) -> None:
    browser = site.visit(f"#/runs/{site.run}")
    browser.wait("document.querySelectorAll('.curve').length >= 4")
    names = browser.value(
        "[...document.querySelectorAll('figcaption')].map(e => e.textContent).join('\\n')"
    )
    assert names.split("\n") == ["reward", HOSTILE, *ANSWERED]
    path = browser.value("document.querySelector('.curve path').getAttribute('d')")
    assert path == "M0.00,94.00L50.00,50.00L100.00,6.00"
    for words in ("Nothing waits or runs.", "failed", "tokens", "expires in 1 d", "kept"):
        browser.see(words)
    browser.value("document.querySelector('.curve').focus()")
    browser.press("ArrowLeft")
    site.metrics(MetricPoint(name="reward", value=0.9, step=4))
    browser.wait("document.querySelector('.curve path').getAttribute('d').match(/L/g).length == 3")
    output = "document.querySelector('.curve .value').textContent"
    assert browser.value(output) == "step 3: 0.3", "what is being read stays"
    browser.value("document.activeElement.blur()")
    assert browser.value(output) == "0.9"


def test_two_checkpoints_answer_side_by_side(site: Site) -> None:
    first, last = site.paths[0], site.paths[-1]
    query = "prompt=hello&max_tokens=6&num_samples=2&seed=7&temperature=1"
    browser = site.visit(f"#/samples?a={first}&b={last}&{query}")
    browser.wait("document.querySelector('form.sampling')")
    browser.value("document.querySelector('textarea').focus()")
    browser.press("Enter", ctrl=True)
    browser.wait(
        "[...document.querySelectorAll('.summary')].filter(e => e.textContent).length == 2"
    )
    shown = browser.value(
        "[...document.querySelectorAll('.pair section')].map(side => "
        "[...side.querySelectorAll('.tokens')].map(e => "
        "[...e.querySelectorAll('.token:not(.stop)')].map(t => t.textContent).join('')))"
    )

    async def ask() -> list[list[str]]:
        async with HttpService(site.address, api_key=site.alice) as service:
            caller = await Caller.open(service)
            sample = Sample(
                sampler_id="",
                prompt="hello",
                params=SamplingParams(max_tokens=6, seed=7),
                num_samples=2,
            )
            texts = []
            for path in (first, last):
                asked = sample.model_copy(update={"sampler_id": path})
                output = (await caller.do(asked, Sampled)).output
                texts.append([sequence.text for sequence in output.sequences])
            return texts

    assert shown == anyio.run(ask)
    shades = "new Set([...document.querySelectorAll('.token')].map(e => e.style.cssText)).size"
    assert browser.value(shades) >= 2, "shaded by log-probability"
    browser.value("document.querySelector('article').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    note = "document.querySelector('article small').textContent"
    assert browser.value(note).startswith(f"“{shown[0][0][1]}” −")
    browser.value("document.activeElement.blur()")
    assert browser.value(note).startswith("6 tokens, log-probability −")
    titles = "[...document.querySelectorAll('.pair section h2')].map(e => e.textContent)"
    assert [t.split(",")[0] for t in browser.value(titles)] == ["step-1", "step-3"]
    assert "seed=7" in browser.value("location.hash") and site.alice not in browser.value(
        "location.hash"
    )
    with httpx.Client(base_url=site.address, headers={"X-WEAVER-API-KEY": site.alice}) as http:
        ended = http.get(f"/v1/runs/{site.run}/operations").json()["ended"]
    assert {one["kind"] for one in ended[:2]} == {"sample"}


def test_a_sample_that_fails_says_why(site: Site) -> None:
    lost = f"weaver://{site.run}/sampler/lost"
    browser = site.visit(f"#/samples?a=base:fake&b={lost}&prompt=x&max_tokens=4")
    browser.wait("document.querySelector('form.sampling')")
    browser.value("document.querySelector('form.sampling').requestSubmit()")
    browser.see(f"there is no checkpoint {lost}")
    browser.wait("document.querySelectorAll('.tokens').length == 2")


def test_a_long_sample_is_folded_and_opens_by_click_keyboard_and_reading(site: Site) -> None:
    browser = site.visit("#/samples?prompt=x&max_tokens=400&num_samples=1&seed=1")
    browser.screen(width=390)
    browser.wait("document.querySelector('form.sampling')")
    browser.value("document.querySelector('form.sampling').requestSubmit()")
    browser.wait("document.querySelectorAll('.fold:not([hidden])').length == 2")
    text, button = "document.querySelector('.tokens')", "document.querySelector('.fold')"
    cut = f"{text}.scrollHeight > {text}.clientHeight + 1"
    assert browser.value(cut) and browser.value(f"{button}.ariaExpanded") == "false"
    browser.value(f"{button}.click()")
    assert not browser.value(cut) and browser.value(f"{button}.ariaExpanded") == "true"
    browser.value(f"{button}.focus()")
    browser.press("Enter")
    assert browser.value(cut)
    browser.value("document.querySelector('article').focus()")
    for _ in range(400):
        browser.press("ArrowRight")
        if not browser.value(cut):
            break
    assert not browser.value(cut), "read beyond what is shown"


def test_load_is_for_administrators_and_others_runs_are_not_found(site: Site) -> None:
    browser = site.visit("#/load", key=site.admin)
    browser.see("0 running, 0 waiting.")
    rows = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)"
    assert browser.value(rows) == ["alice", "ops"]
    for words in ("fake engine", "Memory of the server", "free of", "The home takes"):
        assert words in browser.text()
    assert "Cluster" not in browser.text()
    browser.wait("document.querySelectorAll('.curve').length == 3")
    browser = site.visit("#/load")
    browser.see("needs an administrator's key")
    assert browser.value("document.querySelector('#load-link').hidden")
    for place in ("#/runs/run-000000000000", "#/nowhere"):
        site.visit(place).see("Go to the runs")


def test_load_shows_what_waits_for_what_in_a_cluster(site: Site) -> None:
    rank = RankStatus(host="node-a", pid=7, device="cuda:0", memory_bytes=500_000_000)
    group = GroupStatus(
        name="nano#0",
        model="nano",
        mode="replicated",
        ranks_wanted=2,
        state="waiting",
        since=time.time() - 90,
        waits_for="2 x (1 CPU, 1 GPU)",
        starts=2,
        last_loss="ActorDiedError",
        runs=3,
        ranks=(rank,),
    )
    sampler = SamplerStatus(
        name="nano/sampler-0",
        model="nano",
        state="running",
        since=time.time(),
        waits_for=None,
        starts=1,
        last_loss=None,
        host="node-b",
        pid=8,
        rows=5,
        memory_bytes=2_000_000_000,
    )
    pool = PoolStatus(model="nano", workers=1, rows=64, free_rows=59, waiting=3)
    site.engine.status = EngineStatus(
        ray="Ray at 10.0.0.1", groups=(group,), pools=(pool,), samplers=(sampler,)
    )
    try:
        browser = site.visit("#/load", key=site.admin)
        for words in (
            "Ray at 10.0.0.1",
            "waits for 2 x (1 CPU, 1 GPU)",
            "last lost: ActorDiedError",
            "waiting, 1 min",
            "nano#0, rank 0",
            "500 MB",
            "59 of 64",
            "8 on node-b",
            "2.0 GB",
        ):
            browser.see(words)
    finally:
        site.engine.status = EngineStatus()


def test_every_page_fits_narrow_screens_and_both_schemes(site: Site) -> None:
    places = ["#/runs", f"#/runs/{site.run}", "#/samples", "#/load", "docs"]
    for place in places:
        browser = site.visit(place, key=site.admin)
        browser.wait("document.querySelector('table, textarea, details')")
        grounds = []
        for dark in (False, True):
            browser.screen(width=360, dark=dark)
            wide = browser.value("document.documentElement.scrollWidth")
            assert wide <= 360, (place, wide)
            grounds.append(browser.value("getComputedStyle(document.body).backgroundColor"))
        assert len(set(grounds)) == 2
        tree = browser.send("Accessibility.getFullAXTree")["nodes"]
        roles = [node for node in tree if node.get("role", {}).get("value") in NAMED]
        assert roles and all(node["name"]["value"] for node in roles if not node["ignored"]), place


@pytest.mark.slow
def test_a_hidden_tab_asks_nothing(site: Site) -> None:
    browser = site.visit("#/load", key=site.admin)
    browser.wait("document.querySelectorAll('.curve').length == 3")
    count = "performance.getEntriesByType('resource').filter(e => e.name.includes('/v1/')).length"
    hide = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s})"
    browser.value(hide % "true")
    time.sleep(2.5)  # one answer may have been under way
    before = browser.value(count)
    time.sleep(3)
    assert browser.value(count) == before
    browser.value(f"{hide % 'false'}; document.dispatchEvent(new Event('visibilitychange'))")
    browser.wait(f"{count} > {before}")


def test_the_docs_list_every_route(site: Site) -> None:
    browser = site.visit("docs")
    browser.wait("document.querySelector('details')")
    document = httpx.get(f"{site.address}/openapi.json").json()
    listed = browser.value("[...document.querySelectorAll('details')].map(e => e.id)")
    assert sorted(listed) == sorted(
        f"{method}-{path}" for path, methods in document["paths"].items() for method in methods
    )
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    for words in (
        "SessionRequest",
        "/v1/runs/{run_id}/curves",
        "OperationInfo",
        "application/vnd.weaver",
    ):
        browser.see(words)


@contextmanager
def process(home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`weaver serve`, which serves weaver-nano; killed on leaving."""
    command = [sys.executable, "-c", "from weaver.cli import main; main()", "serve", "--no-auth"]
    settings = {"WEAVER_HOME": str(home), "WEAVER_PORT": str(port), "WEAVER_THREADS": "1"}
    with (home / "log").open("ab") as log:
        server = subprocess.Popen(command, stderr=log, env={**os.environ, **settings})
    try:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_killed_server_is_told_of_and_its_curves_go_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    curve = "[...document.querySelectorAll('.curve')].find(e => e.innerText.startsWith('loss'))"
    steps = f"{curve}?.querySelector('path').getAttribute('d').match(/[,]/g).length"
    lost = "The server cannot be reached. What you see is of an earlier moment"
    with ExitStack() as stack, browsing(tmp_path / "profile") as browser:
        with process(tmp_path, port):
            client = stack.enter_context(ServiceClient(address))
            trainer = client.create_model(base_model="weaver-nano", lora_config={"rank": 4})
            datum = Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})

            def train() -> None:
                trainer.forward_backward([datum], loss_fn="cross_entropy")
                trainer.optim_step(AdamParams(learning_rate=1e-3), wait=True)

            for _ in range(3):
                train()
            browser.screen()
            browser.open(f"{address}/#/runs/{trainer.model_id}")
            browser.wait(f"{steps} == 3")
        browser.see(lost)
        with process(tmp_path, port):
            train()
            browser.wait(f"{steps} == 4")
            assert lost not in browser.text()
            browser.open(f"{address}/#/samples?prompt=rev:loom%3D&max_tokens=8")
            browser.wait("document.querySelector('form.sampling')")
            browser.value("document.querySelector('form.sampling').requestSubmit()")
            browser.wait("document.querySelectorAll('.tokens').length == 4")
            client.close()
