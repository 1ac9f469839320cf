"""The zoo itself: members are the same every time, and differ in what they are there for."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pytest

from tests.zoo import ADAPTERS, FAMILIES, TOKENIZERS, Zoo, covering
from weaver.engine.torch.catalog import Catalog

if TYPE_CHECKING:
    from pathlib import Path


def test_a_member_is_made_once_and_the_same_every_time(zoo: Zoo, tmp_path: Path) -> None:
    first = zoo.model("qwen2", "llama2")
    made = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert zoo.model("qwen2", "llama2") == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == made
    again = Zoo(tmp_path).model("qwen2", "llama2")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in first.iterdir()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_takes_every_family(zoo: Zoo, family: str) -> None:
    folder = str(zoo.model(family))
    assert Catalog({}, allow_paths=True).facts(folder).targets


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_those_of_peft(zoo: Zoo, kind: str) -> None:
    files = {path.name for path in zoo.adapter(zoo.model("qwen3"), kind).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files


def test_the_tokenizers_are_of_several_minds(zoo: Zoo) -> None:
    begun = {name: zoo.tokenizer(name).encode("it is") for name in TOKENIZERS}
    bos = {n for n, tokens in begun.items() if tokens[0] == zoo.tokenizer(n).bos_token_id}
    assert bos == {"llama3", "llama2", "mistral", "gemma"}
    for name in TOKENIZERS:  # no text is lost, whatever its characters
        tokenizer = zoo.tokenizer(name)
        tokens = tokenizer.encode("it is  é 😀", add_special_tokens=False)
        assert tokenizer.decode(tokens, skip_special_tokens=True) == "it is  é 😀", name
    prefixed = {
        name
        for name in TOKENIZERS
        if (tokenizer := zoo.tokenizer(name)).decode(
            [token for part in ("it", "is") for token in tokenizer(part).input_ids],
            skip_special_tokens=True,
        )
        != "itis"
    }
    assert prefixed == {"llama2", "mistral", "phi3", "unigram"}


def test_covering_rows_hold_all_pairs_and_few_others() -> None:
    factors = ("abcd", "xyz", "12", "pq")
    rows = covering(*factors)
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == {
            (a, b) for a in factors[i] for b in factors[j]
        }
    assert len(rows) <= 14
