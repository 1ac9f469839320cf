"""`PageCache`: the KV cache for CUDA, in pages that sequences share. **Not yet run on a GPU.**

See `KVCache` for who uses it. Rows begin with the whole pages of their prompt and a copy of the
last one: a page is written by one sequence alone. Freed pages are used again, so that decoding
allocates nothing, and what a pass needs to know are tensors of a few integers a row.
PagedAttention: https://arxiv.org/abs/2309.06180.

Axes: S sequences of a pass, T its tokens, W pages of the longest, P tokens of a page, N pages, Hq
query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

from weaver.engine.torch.attention import (
    Heads,
    attend,
    fused_attention,
    plain_attention,
    visible,
)
from weaver.engine.torch.kv_cache import CacheShape

PAGE_TOKENS = 256
"""Flash attention takes multiples of it."""
SCRATCH = 0
"""The page that belongs to nobody: rows of a batch that stand for none write there."""


class Tables(NamedTuple):
    """Where the tokens of a pass are."""

    slots: torch.Tensor
    """int64 [T]: of the new tokens, page · P + token of the page."""
    pages: torch.Tensor
    """int32 [S, W]: those of each sequence in order, then its last one again."""
    used: torch.Tensor
    """int32 [S]: tokens of each sequence, with the new ones."""
    starts: torch.Tensor
    """int32 [S + 1]: the first new token of each sequence, and T."""
    longest: int
    """New tokens of a sequence."""

    def to(self, device: torch.device) -> Tables:
        slots, pages, used, starts = (x.to(device, non_blocking=True) for x in self[:4])
        return Tables(slots, pages, used, starts, self.longest)


class PagedAttention(Protocol):
    """What computes the attention of a pass whose keys and values are in pages already."""

    def __call__(self, heads: Heads, kv: torch.Tensor, tables: Tables, /) -> torch.Tensor:
        """q [1, Hq, T, D]; kv [2, N, P, Hkv, D] -> [1, T, Hq, D]"""


def gathered_attention(heads: Heads, kv: torch.Tensor, tables: Tables) -> torch.Tensor:
    """By copies of each sequence's pages; with windows, caps and sinks, in any dtype."""
    window = heads.window
    if tables.longest == 1:
        keys, values = kv[:, tables.pages].flatten(2, 3).transpose(2, 3)
        seen = torch.arange(keys.shape[2], device=kv.device)
        mask = visible(seen, tables.used[:, None] - 1, window)[:, None, None]
        rows = heads._replace(q=heads.q[0].transpose(0, 1)[:, :, None], k=keys, v=values)
        output = (plain_attention if heads.plain else fused_attention)(rows, mask)
        return output[:, :, 0][None]
    outputs = []
    for i, used in enumerate(tables.used.tolist()):
        first, stop = tables.starts[i : i + 2].tolist()
        keys, values = kv[:, tables.pages[i]].flatten(1, 2)[:, None, :used].transpose(2, 3)
        outputs.append(attend(heads._replace(q=heads.q[:, :, first:stop], k=keys, v=values)))
    return torch.cat(outputs, dim=2).transpose(1, 2)


@dataclass(slots=True, eq=False)
class Paged:
    """A prompt's or a row's pages, of which `length` tokens are there."""

    pages: list[int]
    length: int = 0


@dataclass(slots=True)
class Pool:
    """Pages [2, N, P, Hkv, D] of each layer; a page is free when nobody refers to it."""

    shape: CacheShape
    page: int
    layers: list[torch.Tensor] = field(init=False)
    refs: list[int] = field(init=False)
    free: list[int] = field(default_factory=list)
    grown: int = 0
    """How often `layers` became other tensors."""

    def __post_init__(self) -> None:
        self.layers = [self._zeros(1) for _ in range(self.shape.num_layers)]
        self.refs = [1]  # SCRATCH

    def take(self, count: int) -> list[int]:
        """Free pages of zeros, since 0 · NaN is NaN."""
        lacking = count - len(self.free)
        if lacking > 0:
            self._grow(max(lacking, len(self.refs) // 2))
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.refs[page] = 1
        for layer in self.layers:
            layer[:, pages] = 0
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """The same pages, for one more."""
        for page in pages:
            self.refs[page] += 1
        return list(pages)

    def copy(self, page: int) -> int:
        [other] = self.take(1)
        for layer in self.layers:
            layer[:, other] = layer[:, page]
        return other

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.refs[page] -= 1
            if not self.refs[page]:
                self.free.append(page)

    def _grow(self, more: int) -> None:
        """Layer by layer, so that no more than one is there twice."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = torch.cat([layer, self._zeros(more)], dim=1)
        self.grown += 1
        self.free += range(len(self.refs), len(self.refs) + more)
        self.refs += [0] * more

    def _zeros(self, pages: int) -> torch.Tensor:
        shape = (2, pages, self.page, self.shape.num_kv_heads, self.shape.head_dim)
        return torch.zeros(shape, dtype=self.shape.dtype, device=self.shape.device)


class PageCache:
    """See `KVCache`."""

    rows_hold_prompts = True

    def __init__(
        self, shape: CacheShape, attention: PagedAttention, *, page: int = PAGE_TOKENS
    ) -> None:
        self.pool = Pool(shape, page)
        self.block_tokens = page
        self.attention = attention
        self._page_bytes = page * shape.token_bytes

    def prompt_bytes(self, tokens: int) -> int:
        return self._pages(tokens) * self._page_bytes

    def row_bytes(self, prompt: int, new: int) -> int:
        return (self._pages(prompt + new) - prompt // self.pool.page) * self._page_bytes

    def prompt(self, tokens: int, prefix: Sequence[int] = ()) -> Paged:
        """`prefix`: pages, which are not copied."""
        shared, new = self.pool.share(prefix), self._pages(tokens) - len(prefix)
        return Paged(shared + self.pool.take(new), len(prefix) * self.pool.page)

    def read(self, parts: Sequence[tuple[Paged, int]]) -> PagedPass:
        return self._pass([prompt for prompt, _ in parts], [count for _, count in parts])

    def rows(self) -> PageRows:
        return PageRows(self)

    def end(self, prompt: Paged) -> None:
        self.pool.release(prompt.pages)

    def keep(self, sequence: Paged, index: int) -> int:
        return self.pool.share(sequence.pages[index : index + 1])[0]

    def drop(self, block: int) -> None:
        self.pool.release([block])

    def make_room(self, rows: Sequence[Paged]) -> None:
        """Gives each row a page for its next token, if it has none."""
        for row in rows:
            if row.length == len(row.pages) * self.pool.page:
                row.pages += self.pool.take(1)

    def decode(self, rows: Sequence[Paged]) -> PagedPass:
        """The pass that adds a token to each row."""
        self.make_room(rows)
        return self._pass(rows, [1] * len(rows))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page)

    def _pass(self, sequences: Sequence[Paged], counts: Sequence[int]) -> PagedPass:
        tables = tables_of(sequences, counts, page=self.pool.page).to(self.pool.shape.device)
        return PagedPass(self.pool, self.attention, tables, sequences, counts)


class PageRows:
    """See `CachedRows`."""

    def __init__(self, cache: PageCache) -> None:
        self.cache = cache

    def add(self, begins: Sequence[tuple[Paged, int]]) -> list[Paged]:
        return [row for prompt, count in begins for row in self._behind(prompt, count)]

    def _behind(self, prompt: Paged, count: int) -> list[Paged]:
        pool = self.cache.pool
        whole, rest = divmod(prompt.length, pool.page)
        rows = [Paged(pool.share(prompt.pages[:whole]), prompt.length) for _ in range(count)]
        if rest:
            for row in rows:
                row.pages.append(pool.copy(prompt.pages[whole]))
        return rows

    def remove(self, rows: Sequence[Paged]) -> None:
        for row in rows:
            self.cache.pool.release(row.pages)

    def decode(self, rows: Sequence[Paged]) -> PagedPass:
        return self.cache.decode(rows)


def tables_of(sequences: Sequence[Paged], counts: Sequence[int], *, page: int) -> Tables:
    """Of so many new tokens of each sequence, on the host."""
    width = max(len(sequence.pages) for sequence in sequences)
    slots = [
        sequence.pages[at // page] * page + at % page
        for sequence, count in zip(sequences, counts, strict=True)
        for at in range(sequence.length, sequence.length + count)
    ]
    # Nobody else's page is ever read, for what another sequence wrote may not be finite.
    pages = [s.pages + s.pages[-1:] * (width - len(s.pages)) for s in sequences]
    used = [s.length + count for s, count in zip(sequences, counts, strict=True)]
    return Tables(
        slots=torch.tensor(slots),
        pages=torch.tensor(pages, dtype=torch.int32),
        used=torch.tensor(used, dtype=torch.int32),
        starts=torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32),
        longest=max(counts),
    )


class PagedPass:
    """The attention cache of a pass."""

    def __init__(
        self,
        pool: Pool,
        attention: PagedAttention,
        tables: Tables,
        sequences: Sequence[Paged],
        counts: Sequence[int],
    ) -> None:
        self._pool, self._attention, self._tables = pool, attention, tables
        self._grown = list(zip(sequences, counts, strict=True))

    def attend(self, layer: int, heads: Heads) -> torch.Tensor:
        """-> [1, T, Hq, D]"""
        kv = self._pool.layers[layer]
        for pages, new in zip(kv, heads[1:3], strict=True):
            pages.flatten(0, 1).index_copy_(0, self._tables.slots, new[0].transpose(0, 1))
        return self._attention(heads, kv, self._tables)

    def finish(self) -> None:
        """See `AttentionCache`."""
        for sequence, count in self._grown:
            sequence.length += count
