"""Tokenizers from file contents: kept once under their hash, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weaver.engine.fake.model import tokenizer_files
from weaver.errors import InvalidNameError
from weaver.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


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
