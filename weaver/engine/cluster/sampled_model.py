"""`SampledModel`: a base model as a pool and its workers know it. Made by who makes the pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weaver.engine.base import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledModel:
    """A base model as a pool knows it."""

    name: str
    source: str
    """A folder, or a Hugging Face id."""
    context_length: int
    head: str
    """The last part of the name of the layer before the logits."""
    read_tokenizer: Callable[[], Tokenizer]
    """Raises UnsupportedError: it has none that can be read."""
    read_ends: Callable[[], frozenset[int]]
    """The model's own tokens that end a sample."""
