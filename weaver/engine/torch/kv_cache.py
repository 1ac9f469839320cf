"""What a KV cache is: the `KVCache` protocol, between `TorchSampler` and how tokens are kept.

`LoadedModel.new_cache` makes one; `arenas.py` is the one for a CPU, `pages.py` that for CUDA. A
prompt is read in one pass or several, then any number of rows begin behind it, and each grows by a
token in every pass of its rows. A batch of a pass is handed what `read` or `decode` answered, and
the tokens of the pass count as there once the pass is over, see `AttentionCache`. Blocks of what is
there can be kept, so that later prompts begin with them; `Prefixes` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from weaver.engine.torch.packing import AttentionCache

if TYPE_CHECKING:
    import torch

    from weaver.engine.torch.catalog import ModelFacts


class Cached(Protocol):
    """The tokens of one sequence; only its cache changes it."""

    @property
    def length(self) -> int:
        """Tokens that are there."""


P = TypeVar("P", bound=Cached)
"""What a kind of cache has for a prompt."""
P_contra = TypeVar("P_contra", bound=Cached, contravariant=True)
"""The same, of what only takes it."""
R = TypeVar("R", bound=Cached)
"""What it has for a row."""
B = TypeVar("B")
"""What it has for a block."""


class KVCache(Protocol[P, R, B]):
    """Keys and values of one model's earlier tokens."""

    @property
    def block_tokens(self) -> int:
        """Tokens that are kept, and used again, together."""

    @property
    def rows_hold_prompts(self) -> bool:
        """Whether what a prompt takes is kept until the rows behind it are gone, too."""

    def prompt_bytes(self, tokens: int) -> int:
        """What a prompt of so many tokens takes, or so many tokens in blocks."""

    def row_bytes(self, prompt: int, new: int) -> int:
        """What a row of up to `new` tokens behind a prompt of so many takes beside that."""

    def prompt(self, tokens: int, prefix: Sequence[B] = ()) -> P:
        """Room for a prompt of so many tokens, of which those of the prefix are there."""

    def read(self, parts: Sequence[tuple[P, int]]) -> AttentionCache:
        """The pass over the next tokens of several prompts, laid end to end: so many of each."""

    def rows(self) -> CachedRows[P, R]:
        """None yet."""

    def end(self, prompt: P) -> None:
        """No row begins behind this prompt any more; rows that have begun go on."""

    def keep(self, sequence: P | R, index: int) -> B:
        """Block number `index` of a sequence, all of whose tokens are there."""

    def drop(self, block: B) -> None:
        """No prompt begins with this block any more; those that have begun go on."""


class CachedRows(Protocol[P_contra, R]):
    """Rows that step together."""

    def add(self, begins: Sequence[tuple[P_contra, int]]) -> Sequence[R]:
        """New rows behind the tokens of each prompt, so many of each, in this order."""

    def remove(self, rows: Sequence[R]) -> None: ...

    def decode(self, rows: Sequence[R]) -> AttentionCache:
        """The pass that adds a token to each: all of the rows, in the order of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a model's keys and values are like."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @classmethod
    def of(cls, facts: ModelFacts, *, dtype: torch.dtype, device: torch.device) -> CacheShape:
        layers, heads, size = facts.num_layers, facts.num_kv_heads, facts.head_dim
        return cls(num_layers=layers, num_kv_heads=heads, head_dim=size, dtype=dtype, device=device)
