"""`ArenaCache`: the KV cache for a CPU, where attention is fastest over keys without gaps.

See `KVCache` for who uses it. A prompt's keys and values are one tensor, and each row has a copy of
them. A row lies in the smallest arena that holds it and moves to the next when that is full, so
that short rows are not padded to the longest. Arenas are at most twice the size of their rows.

Axes: L layers, Hq query heads, Hkv key heads, D head size, N slots, T tokens of a pass, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from weaver.engine.torch.attention import Heads, attend, plain_attention, visible
from weaver.engine.torch.kv_cache import CacheShape

BLOCK = 64
"""Tokens that are kept together, and attend by one call."""
SMALLEST_ARENA = 64
"""Tokens of a row, a power of two; arenas double from there."""
ARENA_STEP = 1024
"""Tokens, a power of two, by which arenas that are as large or larger grow."""


class ArenaCache:
    """See `KVCache`."""

    block_tokens = BLOCK
    rows_hold_prompts = False

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape

    def prompt_bytes(self, tokens: int) -> int:
        return tokens * self._shape.token_bytes

    def row_bytes(self, prompt: int, new: int) -> int:
        return _capacity(prompt + new) * self._shape.token_bytes

    def prompt(self, tokens: int, prefix: Sequence[torch.Tensor] = ()) -> ArenaPrompt:
        prompt = ArenaPrompt(self._shape, tokens)
        if prefix:
            prompt.length = BLOCK * len(prefix)
            torch.cat(list(prefix), dim=3, out=prompt.kv[:, :, :, : prompt.length])
        return prompt

    def read(self, parts: Sequence[tuple[ArenaPrompt, int]]) -> PrefillPass:
        return PrefillPass(parts)

    def rows(self) -> ArenaRows:
        return ArenaRows(self._shape)

    def end(self, prompt: ArenaPrompt) -> None:
        del prompt.kv

    def keep(self, sequence: ArenaPrompt | ArenaRow, index: int) -> torch.Tensor:
        """A copy [2, L, Hkv, BLOCK, D]"""
        return sequence.kv[:, :, :, index * BLOCK : (index + 1) * BLOCK].clone()

    def drop(self, block: torch.Tensor) -> None:
        """It is gone with the last reference."""


class ArenaPrompt:
    """One prompt's keys and values [2, L, Hkv, tokens, D], of which `length` tokens are there."""

    def __init__(self, shape: CacheShape, tokens: int) -> None:
        self.kv = _allocate(shape, shape.num_kv_heads, tokens)
        self.length = 0


class PrefillPass:
    """The attention cache of a pass over the next tokens of several prompts, laid end to end.

    Each block of a prompt attends by a call of its own, so that its last bits are the same whatever
    was read with it or before it; on a CPU that is no slower than one call for all.
    """

    def __init__(self, parts: Sequence[tuple[ArenaPrompt, int]]) -> None:
        """`parts`: each prompt and how many of its tokens are in the pass."""
        self._parts = parts

    def attend(self, layer: int, heads: Heads) -> torch.Tensor:
        """-> [1, T, Hq, D]"""
        q, k, v, *_ = heads
        outputs: list[torch.Tensor] = []
        row = 0
        for prompt, n in self._parts:
            first, end = prompt.length, prompt.length + n
            prompt.kv[0, layer, :, first:end] = k[0, :, row : row + n]
            prompt.kv[1, layer, :, first:end] = v[0, :, row : row + n]
            while first < end:
                stop = min(end, (first // BLOCK + 1) * BLOCK)
                some = q[:, :, row : row + stop - first]
                keys, values = prompt.kv[:, layer, None, :, :stop]
                outputs.append(attend(heads._replace(q=some, k=keys, v=values)))
                row += stop - first
                first = stop
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def finish(self) -> None:
        """See `AttentionCache`."""
        for prompt, n in self._parts:
            prompt.length += n


@dataclass(slots=True, eq=False)
class ArenaRow:
    """A running row's place."""

    arena: _Arena
    slot: int
    length: int

    @property
    def kv(self) -> torch.Tensor:
        """[2, L, Hkv, capacity, D]"""
        return self.arena.kv[:, :, self.slot]


class ArenaRows:
    """See `CachedRows`."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self._arenas: dict[int, _Arena] = {}

    def add(self, begins: Sequence[tuple[ArenaPrompt, int]]) -> list[ArenaRow]:
        parts = [(prompt.kv, prompt.length + 1, count) for prompt, count in begins]
        return self._put(parts)

    def remove(self, rows: Sequence[ArenaRow]) -> None:
        # The last slot first, so that what fills a slot is of a row that stays.
        for row in sorted(rows, key=lambda row: row.slot, reverse=True):
            row.arena.drop(row.slot)
        for arena in {row.arena for row in rows}:
            if arena.rows:
                arena.shrink()
            else:
                del self._arenas[arena.capacity]

    def decode(self, rows: Sequence[ArenaRow]) -> DecodePass:
        full = [row for row in rows if row.length == row.arena.capacity]
        if full:
            moved = self._put([(row.kv, row.length + 1, 1) for row in full])
            self.remove(full)
            for row, to in zip(full, moved, strict=True):
                row.arena, row.slot = to.arena, to.slot
                row.arena.rows[row.slot] = row
        return DecodePass(list(self._arenas.values()), rows)

    def _put(self, parts: Sequence[tuple[torch.Tensor, int, int]]) -> list[ArenaRow]:
        """Rows with a copy of kv [2, L, Hkv, length, D], for so many tokens, so many of each."""
        arenas, rows = [self._arena(tokens) for _, tokens, _ in parts], list[ArenaRow]()
        for arena in set(arenas):
            arena.reserve(sum(p[2] for a, p in zip(arenas, parts, strict=True) if a is arena))
        for arena, (kv, _, count) in zip(arenas, parts, strict=True):
            rows += arena.put(kv, count)
        return rows

    def _arena(self, length: int) -> _Arena:
        """The one for rows of `length` tokens."""
        capacity = _capacity(length)
        if capacity not in self._arenas:
            self._arenas[capacity] = _Arena(self._shape, capacity=capacity)
        return self._arenas[capacity]


class _Arena:
    """Rows of one capacity, in slots without gaps: kv [2, L, N, Hkv, capacity, D].

    Behind a row's tokens its slot is zero, whoever had it before, since 0 · NaN is NaN.
    """

    def __init__(self, shape: CacheShape, *, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[ArenaRow] = []
        self.kv = _allocate(shape, 0, shape.num_kv_heads, capacity)

    def reserve(self, more: int) -> None:
        """Slots for so many more rows."""
        have, need = self.kv.shape[2], len(self.rows) + more
        if need > have:
            self._resize(max(need, have + have // 2))

    def put(self, kv: torch.Tensor, count: int) -> list[ArenaRow]:
        """New rows with the tokens of kv [2, L, Hkv, length, D], in slots that were reserved."""
        first, length = len(self.rows), kv.shape[3]
        slots = slice(first, first + count)
        self.kv[:, :, slots, :, :length] = kv[:, :, None]
        self.kv[:, :, slots, :, length:] = 0
        rows = [ArenaRow(self, slot, length) for slot in range(first, first + count)]
        self.rows += rows
        return rows

    def drop(self, slot: int) -> None:
        last = self.rows.pop()
        if last.slot != slot:
            self.kv[:, :, slot] = self.kv[:, :, last.slot]
            self.rows[slot] = last
            last.slot = slot

    def shrink(self) -> None:
        if 2 * len(self.rows) < self.kv.shape[2]:
            self._resize(len(self.rows) + len(self.rows) // 2)

    def _resize(self, slots: int) -> None:
        shape = (*self.kv.shape[:2], slots, *self.kv.shape[3:])
        kv, kept = self.kv.new_empty(shape), min(slots, self.kv.shape[2])
        kv[:, :, :kept] = self.kv[:, :, :kept]
        self.kv = kv


def _capacity(tokens: int) -> int:
    """Of the arena for a row of so many tokens."""
    if tokens > ARENA_STEP:
        return -(-tokens // ARENA_STEP) * ARENA_STEP
    return max(SMALLEST_ARENA, 1 << (tokens - 1).bit_length())


def _allocate(shape: CacheShape, *sizes: int) -> torch.Tensor:
    """Keys and values [2, L, *sizes, D], which take no memory before they are written."""
    full = (2, shape.num_layers, *sizes, shape.head_dim)
    return torch.empty(full, dtype=shape.dtype, device=shape.device)


class DecodePass:
    """The attention cache of a pass with one token for each row."""

    def __init__(self, arenas: Sequence[_Arena], rows: Sequence[ArenaRow]) -> None:
        self._rows = rows
        order = {id(row): index for index, row in enumerate(rows)}
        self._parts = [
            _ArenaPass(arena, [order[id(row)] for row in arena.rows]) for arena in arenas
        ]

    def attend(self, layer: int, heads: Heads) -> torch.Tensor:
        """-> [1, B, Hq, D]; every row is a sequence of one token."""
        q, k, v = (x[0].transpose(0, 1) for x in heads[:3])
        if len(self._parts) == 1 and self._parts[0].in_order:
            return self._parts[0].attend(layer, heads._replace(q=q, k=k, v=v))[None]
        output = torch.empty_like(q)
        for part in self._parts:
            rows = part.batch_rows
            output[rows] = part.attend(layer, heads._replace(q=q[rows], k=k[rows], v=v[rows]))
        return output[None]

    def finish(self) -> None:
        """See `AttentionCache`: every row is one token longer."""
        for row in self._rows:
            row.length += 1


class _ArenaPass:
    """One arena's share of a pass; its rows are in the order of their slots."""

    def __init__(self, arena: _Arena, batch_rows: list[int]) -> None:
        self._kv = arena.kv
        device = arena.kv.device
        lengths = [row.length for row in arena.rows]
        self._shortest, self._width = min(lengths), max(lengths) + 1
        self._at = torch.tensor(lengths, device=device)
        heads = arena.kv.shape[3]
        slots = torch.arange(len(lengths) * heads, device=device) * arena.capacity
        self._write = slots + self._at.repeat_interleave(heads)
        self._masks: dict[int | None, torch.Tensor] = {}
        self.in_order = batch_rows == list(range(len(batch_rows)))
        self.batch_rows = torch.tensor(batch_rows, device=device)

    def attend(self, layer: int, heads: Heads) -> torch.Tensor:
        """q [n, Hq, D], k and v [n, Hkv, D] -> [n, Hq, D].

        The query heads of one key head are the rows of one product. In fp32 on a CPU two batched
        products take 0.6 of the time of `scaled_dot_product_attention`.
        """
        q, k, v, scaling, window, *_ = heads
        n, kv_heads, size = k.shape
        for cached, new in zip(self._kv[:, layer], (k, v), strict=True):
            cached.view(-1, size).index_copy_(0, self._write, new.reshape(-1, size))
        begin = 0 if window is None else max(0, self._shortest - window + 1)
        keys, values = self._kv[:, layer, :n].flatten(1, 2)[:, :, begin : self._width]
        groups = q.reshape(n * kv_heads, -1, size)
        mask = self._mask(begin, kv_heads=kv_heads, window=window)
        if heads.plain:
            seen = mask.view(n, kv_heads, 1, -1)[:, :1] == 0
            keys, values = (x.view(n, kv_heads, -1, size) for x in (keys, values))
            return plain_attention(heads._replace(q=q[:, :, None], k=keys, v=values), seen)[:, :, 0]
        if q.dtype == torch.float32 and q.device.type == "cpu":
            scores = torch.baddbmm(mask, groups, keys.transpose(1, 2), alpha=scaling)
            output = torch.bmm(scores.softmax(-1), values)
        else:
            output = scaled_dot_product_attention(
                groups, keys, values, attn_mask=mask, scale=scaling
            )
        return output.view(q.shape)

    def _mask(self, begin: int, *, kv_heads: int, window: int | None) -> torch.Tensor:
        """[n * Hkv, 1, keys from `begin`]: 0 where visible, else -inf."""
        if window not in self._masks:
            seen = torch.arange(begin, self._width, device=self._kv.device)
            never = ~visible(seen, self._at[:, None], window)
            mask = torch.zeros_like(never, dtype=self._kv.dtype).masked_fill_(never, -torch.inf)
            self._masks[window] = mask.repeat_interleave(kv_heads, 0)[:, None]
        return self._masks[window]
