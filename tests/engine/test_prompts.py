"""What tokenizers and templates refuse is the caller's error, with their words."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import pytest

from tests.zoo import TOKENIZERS
from tests.zoo.tokenizers import CHATML
from weaver import ServiceClient
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.text import encode_prompt
from weaver.errors import (
    ContextLengthError,
    InvalidRequestError,
    TokenOutOfRangeError,
    UnsupportedError,
)
from weaver.types import Message, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.zoo import Zoo

USER = Message(role="user", content="What is it?")
SYSTEM = Message(role="system", content="Be brief.")
REPLY = Message(role="assistant", content="Yes.")
RAISES = {
    "raise_exception('no such luck')": "no such luck",
    "messages[7]['content']": "no element 7",
    "1 // (messages | length - 1)": "by zero",
    "messages[0]['content'] + 1": "str",
    "nothing.at_all": "nothing",
    "x | no_such_filter": "no_such_filter",
    "''.__class__.__mro__": "unsafe",
}
"""What a template may do to itself, and a word of what is then said."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_chat_is_what_the_template_makes_of_it(zoo: Zoo, name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    if name == "plain":
        with pytest.raises(UnsupportedError, match="no chat template"):
            encode_prompt(tokenizer, [USER], name="it")
        return
    tokens = encode_prompt(tokenizer, [USER], name="it")
    text = tokenizer.apply_chat_template([dict(USER)], tokenize=False, add_generation_prompt=True)
    assert tokens == tokenizer.encode(text, add_special_tokens=False)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tools_are_shown_or_refused(zoo: Zoo, name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    without = encode_prompt(tokenizer, [USER], name="it") if tokenizer.chat_template else []
    try:
        tokens = encode_prompt(tokenizer, [USER], name="it", tools=[TOOL])
    except UnsupportedError as error:
        assert error.field in ("tools", "prompt")
        return
    assert tokens != without
    assert "add" in tokenizer.decode(tokens)


def test_both_happen_in_the_zoo(zoo: Zoo) -> None:
    shown = set()
    for name in TOKENIZERS:
        try:
            encode_prompt(zoo.tokenizer(name), [USER], name="it", tools=[TOOL])
            shown.add(True)
        except UnsupportedError:
            shown.add(False)
    assert shown == {True, False}


def test_calls_reach_the_template(zoo: Zoo) -> None:
    tokenizer = copy.deepcopy(zoo.tokenizer("qwen"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = Message(role="assistant", content="", tool_calls=(call,))
    text = tokenizer.decode(encode_prompt(tokenizer, [said], name="it"))
    assert "add" in text and "arguments" in text


@pytest.mark.parametrize(
    ("name", "chat", "words"),
    [
        ("gemma", [SYSTEM, USER], "System role not supported"),
        ("llama2", [SYSTEM, USER], "must alternate"),
        ("mistral", [USER, USER], "must alternate"),
        ("llama2", [REPLY], "must alternate"),
        ("qwen", [], "empty"),
    ],
)
def test_a_chat_that_the_template_refuses(
    zoo: Zoo, name: str, chat: Sequence[Message], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        encode_prompt(zoo.tokenizer(name), chat, name="it")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("expression", RAISES)
def test_whatever_a_template_raises_is_told_to_the_caller(zoo: Zoo, expression: str) -> None:
    tokenizer = type(zoo.tokenizer("qwen"))(tokenizer_object=zoo.tokenizer("qwen")._tokenizer)
    for template in (f"{{{{ {expression} }}}}{CHATML}", {"other": CHATML}):
        tokenizer.chat_template = template
        with pytest.raises(InvalidRequestError) as caught:
            encode_prompt(tokenizer, [USER], name="it")
        assert caught.value.field == "prompt"
        if isinstance(template, str):
            assert RAISES[expression] in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("a\ud83d", "prompt"),
        ([{"role": "user", "content": "a\ude00"}], "prompt[0].content"),
        ([{"role": "us\ud83der", "content": "a"}], "prompt[0].role"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "prompt"),
        ("a<|extra_0|>", "prompt"),
    ],
)
def test_a_client_is_told_and_the_log_has_no_defect(
    zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: object, field: str
) -> None:
    tokenizer = "beyond" if "extra" in str(prompt) else "gemma"
    with ServiceClient(home=tmp_path) as service:
        sampler = service.create_sampling_client(base_model=str(zoo.model("llama", tokenizer)))
        with pytest.raises(InvalidRequestError) as caught:
            sampler.sample(prompt, {"max_tokens": 2})  # type: ignore[call-overload]
        assert isinstance(caught.value, TokenOutOfRangeError) == ("extra" in str(prompt))
        assert sampler.sample("a", {"max_tokens": 2}).sequences[0].tokens
    assert caught.value.field == field
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_stop_string_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        SamplingParams(stop=["a", "\udfff"])
    assert caught.value.field == "stop"


def test_the_engine_names_the_model_as_the_caller_does(zoo: Zoo) -> None:
    engine = TorchEngine({"strict": zoo.model("llama", "gemma")}, allow_paths=False)
    with pytest.raises(InvalidRequestError, match="template of strict refuses it: System role"):
        engine.encode("strict", [SYSTEM])
    engine.close()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_that_no_context_holds_is_refused_before_it_is_encoded(
    zoo: Zoo, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = TorchEngine(), str(zoo.model(tokenizer=name))
    facts = engine._catalog.facts(folder)
    longest = max(facts.tokenizer.get_vocab(), key=len)
    assert facts.longest_text == facts.info.context_length * len(longest)
    monkeypatch.setattr("weaver.engine.torch.engine.encode_prompt", lambda *_, **__: [1])
    assert engine.encode(folder, "a" * facts.longest_text) == [1]
    monkeypatch.setattr("weaver.engine.torch.engine.encode_prompt", pytest.fail)
    long = "a" * (facts.longest_text + 1)
    for prompt in (long, [Message(role="user", content=long)], [USER, REPLY, USER] * len(long)):
        with pytest.raises(ContextLengthError, match="characters") as caught:
            engine.encode(folder, prompt)
        assert caught.value.field == "prompt"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_that_fits_is_too_long(zoo: Zoo, name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    longest = max(map(len, tokenizer.get_vocab()))
    for text in ("it is " * 40, "    " * 90, "é日本\n" * 50, longest * "a", "\u0301e" * 60):
        assert len(text) <= longest * len(tokenizer.encode(text))
