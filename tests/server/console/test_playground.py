"""The console's playground in a browser: conversations, stopped, refused, without a template."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.server.console.browser import CHROMIUM
from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.console.browser import Browser
    from tests.server.console.site import Site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
REPLIES = "[...document.querySelectorAll('section:not([hidden]) article:not(.mine) .said')]"
ENDED = "[...document.querySelectorAll('.talk .summary')].filter(e => /ended by/.test(e.innerText))"


@pytest.fixture(autouse=True)
def quiet_engine(site: Site) -> Iterator[None]:
    """Whatever a test hooks into the engine is taken off."""
    usual = site.engine.hook
    yield
    site.engine.hook = usual


def send(browser: Browser, text: str) -> None:
    browser.wait("document.querySelector('.composer .primary')?.disabled === false")
    browser.value("document.querySelector('.composer textarea').focus()")
    browser.send("Input.insertText", text=text)
    browser.press("Enter", ctrl=True)


def test_two_models_go_on_from_their_own_replies(site: Site) -> None:
    asked = []
    site.engine.hook = lambda name, argument: asked.append(argument) if name == "encode" else None
    query = "system=Be+brief.&max_tokens=8&seed=3&temperature=1"
    browser = site.visit(f"#/playground?a=base:fake&b={site.paths[-1]}&{query}")
    send(browser, "hello")
    browser.wait(f"{ENDED}.length == 2")
    assert "8 tokens in" in browser.text() and "ended by length" in browser.text()
    first = browser.value(f"{REPLIES}.map(e => e.textContent)")
    assert len(first) == 2 and all(first)
    with httpx.Client(
        base_url=site.address, headers={"Authorization": f"Bearer {site.alice}"}
    ) as http:
        for model, shown in zip(("fake", site.paths[-1]), first, strict=True):
            messages = [("system", "Be brief."), ("user", "hello")]
            body = {
                "model": model,
                "messages": [{"role": role, "content": text} for role, text in messages],
                "max_tokens": 8,
                "seed": 3,
            }
            reply = http.post("/v1/chat/completions", json=body).json()
            assert reply["choices"][0]["message"]["content"] == shown
    asked.clear()
    send(browser, "again")
    browser.wait(f"{REPLIES}.length == 4 && {ENDED}.length == 2")
    turns = [[(one.role, one.content) for one in prompt] for prompt in asked]
    for text in first:
        assert [
            ("system", "Be brief."),
            ("user", "hello"),
            ("assistant", text),
            ("user", "again"),
        ] in turns
    assert "seed=3" in browser.value("location.hash")
    assert "again" not in browser.value("location.hash")
    browser.value("document.querySelector('.composer button').click()")
    assert browser.value(f"{REPLIES}.length") == 0


def test_stop_cancels_on_the_server_and_keeps_what_came(site: Site) -> None:
    site.engine.hook = lambda name, argument: time.sleep(0.05) if name == "step" else None
    browser = site.visit(f"#/playground?a={site.paths[-1]}&b=&max_tokens=2000")
    send(browser, "a long story")
    browser.wait(f"{REPLIES}[0]?.textContent.length > 3")
    browser.value("document.querySelector('.composer button:not([hidden]):nth-of-type(2)').click()")
    browser.see("Stopped.")
    assert browser.value(f"{REPLIES}.length") == 1
    url = f"{site.address}/v1/runs/{site.run}/operations"
    headers = {"Authorization": f"Bearer {site.alice}"}
    deadline = time.monotonic() + 20
    while (state := httpx.get(url, headers=headers).json())["num_pending"]:
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    assert state["ended"][0]["kind"] == "sample"
    assert state["ended"][0]["state"] == "cancelled"
    site.engine.hook = lambda name, argument: None
    assert browser.value("document.querySelector('.composer .primary').disabled") is False


def test_errors_are_words_and_the_other_side_goes_on(site: Site) -> None:
    lost = f"weaver://{site.run}/sampler/lost"
    browser = site.visit(f"#/playground?a=base:fake&b={lost}&max_tokens=4&mode=plain")
    send(browser, "x")
    browser.see(f"there is no checkpoint {lost}")
    browser.wait(f"{ENDED}.length == 1")
    assert browser.value(f"{REPLIES}[0].textContent.length") > 0


def test_a_model_without_a_chat_template_completes_text(site: Site) -> None:
    def refuse(name: str, argument: object) -> None:
        if name == "encode" and not isinstance(argument, str):
            raise UnsupportedError("the tokenizer of fake has no chat template.", field="prompt")

    site.engine.hook = refuse
    browser = site.visit("#/playground?a=base:fake&b=&max_tokens=4")
    browser.see("It cannot chat")
    browser.see("the tokenizer of fake has no chat template.")
    browser.value("document.querySelector('.hint button').click()")
    assert browser.value("document.querySelector('[name=mode]').value") == "plain"
    browser.wait("!document.querySelector('.hint')")
    assert not browser.value("document.querySelector('[name=system]').checkVisibility()")
    send(browser, "Once upon")
    browser.wait(f"{ENDED}.length == 1")
    assert browser.value(f"{REPLIES}[0].textContent.length") > 0
