"""`Prefixes`: keys and values of what was read or drawn, for prompts that begin with it.

`Reader` keeps whole blocks here, by the tokens up to each, and asks before it reads a prompt. What
one owner keeps no other finds: an owner is a tenant on the weights of one id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from weaver.engine.torch.kv_cache import Cached, KVCache
from weaver.engine.torch.models import PublishedWeights


class Owner(NamedTuple):
    """Whose prefixes these are."""

    weights: PublishedWeights
    tenant: str


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    number: int
    """The parent's number in the keys of those that follow."""
    owner: Owner
    cache: KVCache[Any, Any, Any]
    block: Any
    nbytes: int


class Prefixes:
    """A tree of blocks. Those that were used least lately go first, and ends before beginnings."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._nodes: OrderedDict[tuple[int, tuple[int, ...]], _Node] = OrderedDict()
        """By the parent's number and the block's tokens; those used last come last, and a parent
        behind its children."""
        self._open: set[PublishedWeights] = set()
        self._roots: dict[Owner, int] = {}
        self._count = 0

    def open(self, weights: PublishedWeights) -> None:
        """From now on prefixes of these weights are kept."""
        self._open.add(weights)

    def find(
        self, owner: Owner, tokens: Sequence[int], cache: KVCache[Any, Any, Any], *, most: int
    ) -> list[Any]:
        """The blocks of a cache that `tokens` begin with, at most so many."""
        path = self._path(owner, tokens, cache.block_tokens, most)
        self._touch(path)
        return [self._nodes[key].block for key in path]

    def keep(
        self,
        owner: Owner,
        tokens: Sequence[int],
        sequence: Cached,
        cache: KVCache[Any, Any, Any],
        *,
        limit: int,
    ) -> None:
        """Keeps what is there of a sequence, whose tokens these are, in `limit` bytes of all."""
        if owner.weights not in self._open:
            return
        block = cache.block_tokens
        count = sequence.length // block
        path = self._path(owner, tokens, block, count)
        parent = self._nodes[path[-1]].number if path else self._roots.get(owner)
        if parent is None:
            parent = self._roots[owner] = self._number()
        size = cache.prompt_bytes(block)
        # more than the limit would only take the place of its own parents
        for index in range(len(path), min(count, limit // size)):
            key = parent, tuple(tokens[index * block : (index + 1) * block])
            parent = self._number()
            self._nodes[key] = _Node(parent, owner, cache, cache.keep(sequence, index), size)
            self.nbytes += size
            path.append(key)
        self._touch(path)
        self.trim(limit)

    def trim(self, limit: int) -> None:
        """Gives up what is over so many bytes."""
        while self.nbytes > limit:
            _, node = self._nodes.popitem(last=False)
            self._drop(node)

    def forget(self, weights: PublishedWeights) -> None:
        """Gives up what was kept of these weights; no more of them is."""
        self._open.discard(weights)
        for owner in [owner for owner in self._roots if owner.weights is weights]:
            del self._roots[owner]
        for key in [key for key, node in self._nodes.items() if node.owner.weights is weights]:
            self._drop(self._nodes.pop(key))

    def drop_cache(self, cache: KVCache[Any, Any, Any]) -> None:
        """Gives up what was kept in one model's cache; its owners may keep more later."""
        for key in [key for key, node in self._nodes.items() if node.cache is cache]:
            self._drop(self._nodes.pop(key))

    def _path(
        self, owner: Owner, tokens: Sequence[int], block: int, most: int
    ) -> list[tuple[int, tuple[int, ...]]]:
        """Keys of the blocks that are there, from the first on."""
        path: list[tuple[int, tuple[int, ...]]] = []
        parent = self._roots.get(owner)
        while parent is not None and len(path) < most:
            at = len(path) * block
            key = parent, tuple(tokens[at : at + block])
            node = self._nodes.get(key)
            parent = None if node is None else node.number
            if node is not None:
                path.append(key)
        return path

    def _touch(self, path: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        for key in reversed(path):
            self._nodes.move_to_end(key)

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _drop(self, node: _Node) -> None:
        self.nbytes -= node.nbytes
        node.cache.drop(node.block)
