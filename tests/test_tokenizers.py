"""Tokenizers from file contents, kept once under their hash; how texts begin and replies end."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

from tests.fake_engine.model import tokenizer_files
from tests.zoo import TOKENIZERS
from weaver.engine.torch.catalog import Catalog
from weaver.errors import InvalidNameError, InvalidRequestError
from weaver.tokenizers import (
    copy_tokenizer,
    encode_text,
    end_tokens,
    load_tokenizer,
    render_chat,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.zoo import Zoo

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


def test_it_encodes_decodes_and_is_stored_once(tmp_path: Path) -> None:
    files = tokenizer_files()
    tokenizer = load_tokenizer(files, tmp_path)
    assert tokenizer.encode("aé") == list("aé".encode())
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"
    load_tokenizer(dict(reversed(files.items())), tmp_path)
    (stored,) = tmp_path.iterdir()
    assert {f.name: f.read_bytes() for f in stored.iterdir()} == files
    load_tokenizer({**files, "extra.txt": b"1"}, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "..", ""])
def test_a_file_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidNameError, match="tokenizer file"):
        load_tokenizer({**tokenizer_files(), name: b""}, tmp_path / "cache")
    assert not list(tmp_path.rglob("x"))


def test_templates_by_name_reach_the_clients(zoo: Zoo, tmp_path: Path) -> None:
    folder = str(zoo.model("llama", "named"))
    files = Catalog({}, allow_paths=True).facts(folder).tokenizer_files()
    tokenizer, own = load_tokenizer(files, tmp_path), zoo.tokenizer("named")
    assert tokenizer.chat_template == own.chat_template
    tools = [{"type": "function", "function": {"name": "rain"}}]
    assert "rain" in render_chat(tokenizer, CHAT, tools=tools)
    assert "rain" not in render_chat(tokenizer, CHAT)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_client_s_tokenizer_is_the_model_s(zoo: Zoo, tmp_path: Path, name: str) -> None:
    facts = Catalog({}, allow_paths=True).facts(str(zoo.model("llama", name)))
    tokenizer, own = load_tokenizer(facts.tokenizer_files(), tmp_path), zoo.tokenizer(name)
    assert tokenizer.chat_template == own.chat_template
    assert end_tokens(tokenizer) == end_tokens(own)
    for text in ("What is it?", " Yes.\n", "é 😀  a", *end_tokens(own)):
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_copy_is_the_same_until_one_is_changed(zoo: Zoo, name: str) -> None:
    own = zoo.tokenizer(name)
    tokenizer, texts = copy_tokenizer(own), ("What is it?", " Yes.\n", "é 😀  a", *end_tokens(own))
    assert tokenizer.chat_template == own.chat_template
    assert end_tokens(tokenizer) == end_tokens(own)
    assert tokenizer.get_added_vocab() == own.get_added_vocab()
    for text in texts:
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text))
    before, length = own.encode("a <|mine|>"), len(own)
    tokenizer.add_tokens(["<|mine|>"])
    tokenizer.chat_template, tokenizer.pad_token = "mine", end_tokens(own).popitem()[0]
    tokenizer(list(texts), padding="max_length", max_length=50)
    assert len(tokenizer.encode("a <|mine|>", add_special_tokens=False)) < len(before)
    assert (own.encode("a <|mine|>"), len(own)) == (before, length)
    assert own.chat_template != "mine" and own.backend_tokenizer.padding is None


def test_threads_that_ask_at_once_get_one(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Catalog({}, allow_paths=True).facts(str(zoo.model("llama", "qwen")))
    load = AutoTokenizer.from_pretrained

    def slow(source: object, **options: Any) -> Any:
        time.sleep(0.1)
        return load(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", slow)
    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(lambda _: facts.tokenizer, range(3))
    assert all(other is first for other in others)


def test_a_copy_keeps_the_numbers_of_added_tokens_with_gaps(tmp_path: Path) -> None:
    own = TOKENIZERS["qwen"]()
    backend = json.loads(own.backend_tokenizer.to_str())
    backend["added_tokens"].append(backend["added_tokens"][-1] | {"id": 5000, "content": "<gap>"})
    own.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    own = load_tokenizer({f.name: f.read_bytes() for f in tmp_path.iterdir()}, tmp_path / "cache")
    assert copy_tokenizer(own).encode("<gap> a") == own.encode("<gap> a")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_has_one_beginning_and_no_end(zoo: Zoo, name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    for text in ("What is it?", "a", " a", ""):
        assert encode_text(tokenizer, text) == tokenizer.encode(text)
    if tokenizer.chat_template:
        rendered = render_chat(tokenizer, CHAT)
        tokens = tokenizer.encode(rendered, add_special_tokens=False)
        assert tokens.count(tokenizer.bos_token_id) <= 1
        expected = tokens if tokens[0] == tokenizer.bos_token_id else tokenizer.encode(rendered)
        assert encode_text(tokenizer, rendered) == expected


def test_an_end_that_a_tokenizer_writes_itself_is_left_out() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = TOKENIZERS["llama3"]()
    begin, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|begin_of_text|>", "<|eot_id|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A <|eot_id|>",
        special_tokens=[("<|begin_of_text|>", begin), ("<|eot_id|>", end)],
    )
    assert tokenizer.encode("What")[-1] == end
    assert encode_text(tokenizer, "What") == tokenizer.encode("What")[:-1]
    assert encode_text(tokenizer, "") == [begin]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen", ["<|im_end|>"]),
        ("named", ["<|im_end|>"]),
        ("llama3", ["<|eot_id|>"]),
        ("llama2", ["</s>"]),
        ("gemma", ["<eos>", "<end_of_turn>"]),  # the tokenizer names the end of a document alone
        ("plain", ["<|endoftext|>"]),
    ],
)
def test_a_reply_ends_at_what_the_template_writes(zoo: Zoo, name: str, ends: list[str]) -> None:
    tokenizer = zoo.tokenizer(name)
    assert end_tokens(tokenizer) == {end: tokenizer.convert_tokens_to_ids(end) for end in ends}


def test_what_a_template_refuses_is_told_in_its_words(zoo: Zoo) -> None:
    with pytest.raises(InvalidRequestError, match=r"mine: .*System role not supported") as caught:
        render_chat(zoo.tokenizer("gemma"), [{"role": "system", "content": "s"}], field="mine")
    assert caught.value.hint
    with pytest.raises(InvalidRequestError, match="refuses it"):
        render_chat(zoo.tokenizer("qwen"), [{"role": "user", "content": None}])
