"""`Zoo`: folders of tiny models on disk, each made once; and the rows that cover its kinds."""

from __future__ import annotations

from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import torch

from tests.zoo.adapters import save_adapter
from tests.zoo.models import random_model
from tests.zoo.tokenizers import BEYOND, TOKENIZERS
from weaver.engine.torch.files import without_progress_bars

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Zoo:
    """Makes what is asked for below `root`; what is asked for again is what was made before."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tokenizers: dict[str, Any] = {}

    def tokenizer(self, name: str) -> Any:
        """A transformers tokenizer of `TOKENIZERS`. It is shared: change none of its settings."""
        if name not in self._tokenizers:
            self._tokenizers[name] = TOKENIZERS[name]()
        return self._tokenizers[name]

    def model(
        self, family: str = "llama", tokenizer: str = "qwen", *, dtype: str = "float32"
    ) -> Path:
        """A folder with random weights of a family in `FAMILIES`, and a tokenizer."""
        folder = self._root / f"{family}-{tokenizer}-{dtype}"
        if not folder.exists():
            words = self.tokenizer(tokenizer)
            vocab_size = len(words) - (BEYOND if tokenizer == "beyond" else 0)
            ids = {f"{n}_token_id": getattr(words, f"{n}_token_id") for n in ("bos", "eos", "pad")}
            model = random_model(family, vocab_size=vocab_size, **ids)
            with without_progress_bars():
                model.to(getattr(torch, dtype)).save_pretrained(folder)
            words.save_pretrained(folder)
        return folder

    def adapter(self, base: Path, kind: str = "all") -> Path:
        """A folder with an adapter of a kind in `ADAPTERS` on the model in `base`."""
        folder = self._root / f"{base.name}-{kind}"
        if not folder.exists():
            with without_progress_bars():
                save_adapter(base, kind, folder)
        return folder


def covering(*factors: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows with a level of each factor, in which any two levels of two factors meet.

    Greedy, hence the same every time, and not much longer than the two longest factors make it.
    """
    rows = list(product(*factors))
    pairs = list(combinations(range(len(factors)), 2))
    left = {(i, row[i], j, row[j]) for row in rows for i, j in pairs}
    chosen: list[tuple[str, ...]] = []
    while left:
        best = max(rows, key=lambda row: sum((i, row[i], j, row[j]) in left for i, j in pairs))
        left -= {(i, best[i], j, best[j]) for i, j in pairs}
        chosen.append(best)
    return chosen
