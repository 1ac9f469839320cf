"""The contract of KV caches, over each: plain attention of whole sequences; and bookkeeping."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.engine.conftest import DEVICE
from tests.engine.varlen_reference import varlen_attn
from weaver.engine.torch.arenas import ArenaCache
from weaver.engine.torch.attention import Heads, attend
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.pages import PAGE_TOKENS, SCRATCH, PageCache, gathered_attention
from weaver.engine.torch.varlen import paged_varlen_attention

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, HQ, HKV, D = 2, 4, 2, 8
SHAPE = CacheShape(
    num_layers=LAYERS,
    num_kv_heads=HKV,
    head_dim=D,
    dtype=torch.float32,
    device=DEVICE,
)
SCALING = 0.3
WINDOWS = (None, 5)
"""Of the two layers."""
PAGE = 16
CACHES: dict[str, Callable[[CacheShape], Any]] = {
    "arenas": ArenaCache,
    "gather": partial(PageCache, attention=gathered_attention, page=PAGE),
    "varlen": partial(
        PageCache,
        attention=partial(paged_varlen_attention, varlen_attn=varlen_attn),
        page=PAGE,
    ),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> Any:
    return CACHES[request.param](SHAPE)


def assert_nothing_is_kept(cache: Any, together: Any) -> None:
    if isinstance(cache, PageCache):
        refs = cache.pool.refs
        assert refs == [1] + [0] * (len(refs) - 1)
        assert sorted(cache.pool.free) == [i for i in range(len(refs)) if i != SCRATCH]
    else:
        assert not together._arenas


def poison(cache: Any, row: Any) -> None:
    """As a model whose weights are not finite does."""
    if isinstance(cache, PageCache):
        own = [page for page in row.pages if cache.pool.refs[page] == 1]
        for layer in cache.pool.layers:
            layer[:, own] = torch.nan
    else:
        row.arena.kv[:, :, row.slot] = torch.nan


class Sequence:
    """Random projections of one sequence, and attention over all of it at once."""

    def __init__(self, seed: int, length: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(LAYERS, HQ, length, D, generator=g).to(DEVICE)
        self.kv = torch.randn(2, LAYERS, HKV, length, D, generator=g).to(DEVICE)

    def expected(self, layer: int, begin: int, end: int) -> torch.Tensor:
        """[tokens, Hq, D]"""
        j = torch.arange(end, device=DEVICE)
        i = j[:, None]
        window = WINDOWS[layer]
        mask = (j <= i) & (True if window is None else j > i - window)
        keys, values = (x.repeat_interleave(HQ // HKV, 0) for x in self.kv[:, layer, :, :end])
        o = scaled_dot_product_attention(
            self.q[layer, :, :end], keys, values, attn_mask=mask, scale=SCALING
        )
        return o[:, begin:end].transpose(0, 1)


def feed(cache: object, spans: list[tuple[Sequence, int, int]]) -> None:
    """Runs both layers over tokens [begin, end) of each sequence and compares."""
    for layer in range(LAYERS):
        q = torch.cat([s.q[layer, :, b:e] for s, b, e in spans], dim=1)[None]
        k, v = torch.cat([s.kv[:, layer, :, b:e] for s, b, e in spans], dim=2)[:, None]
        heads = Heads(q, k, v, SCALING, WINDOWS[layer])
        output = cache.attend(layer, heads)  # type: ignore[attr-defined]
        expected = torch.cat([s.expected(layer, b, e) for s, b, e in spans])[None]
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    cache.finish()  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_prompts_are_read_together_and_in_pieces(cache: Any, chunk: int) -> None:
    sequences = [Sequence(i, length) for i, length in enumerate((17, 4, 9))]
    prompts = [cache.prompt(s.kv.shape[3]) for s in sequences]
    while left := [
        (s, p) for s, p in zip(sequences, prompts, strict=True) if p.length < s.kv.shape[3]
    ]:
        sizes = [min(chunk, s.kv.shape[3] - p.length) for s, p in left]
        spans = [(s, p.length, p.length + n) for (s, p), n in zip(left, sizes, strict=True)]
        feed(cache.read([(p, n) for (_, p), n in zip(left, sizes, strict=True)]), spans)


def test_prompts_begin_with_blocks_of_prompts_and_rows(cache: Any) -> None:
    """Which nobody writes to, and which stay when what they were of is gone."""
    block, together = cache.block_tokens, cache.rows()
    first = Sequence(1, 3 * block)
    prompt = cache.prompt(2 * block - 1)
    feed(cache.read([(prompt, prompt_length := 2 * block - 1)]), [(first, 0, 2 * block - 1)])
    assert prompt.length == prompt_length
    blocks = [cache.keep(prompt, 0)]
    [row] = together.add([(prompt, 1)])
    cache.end(prompt)
    for at in range(prompt_length, prompt_length + 2):
        feed(together.decode([row]), [(first, at, at + 1)])
    blocks.append(cache.keep(row, 1))
    poison(cache, row)
    together.remove([row])
    for length in (2 * block + 1, 3 * block):  # the second after the first has written its own
        again = cache.prompt(length, blocks)
        assert again.length == 2 * block
        feed(cache.read([(again, length - 2 * block)]), [(first, 2 * block, length)])
        cache.end(again)
    for each in blocks:
        cache.drop(each)
    assert_nothing_is_kept(cache, together)


def test_rows_join_leave_and_grow(cache: Any) -> None:
    """Rows of every length in random order; some prompts are shared, one row is poisoned by NaN."""
    rng = random.Random(0)
    together = cache.rows()
    running: list[tuple[Sequence, Any]] = []
    for step in range(140):
        if step % 7 == 0 and len(running) < 9:
            length = rng.choice([1, 3, 60, 63, 64, 126])
            sequence = Sequence(step, length + 140)
            prompt = cache.prompt(length)
            feed(cache.read([(prompt, length)]), [(sequence, 0, length)])
            rows = together.add([(prompt, rng.choice([1, 3]))])
            cache.end(prompt)
            running += [(sequence, row) for row in rows]
        if running and rng.random() < 0.12:
            _, row = running.pop(rng.randrange(len(running)))
            poison(cache, row)
            together.remove([row])
        rng.shuffle(running)
        if running:
            decode = together.decode([row for _, row in running])
            feed(decode, [(s, row.length, row.length + 1) for s, row in running])
    for _, row in running:
        together.remove([row])
    assert_nothing_is_kept(cache, together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_fused_attention(dtype: torch.dtype) -> None:
    shape = CacheShape(num_layers=1, num_kv_heads=HKV, head_dim=D, dtype=dtype, device=DEVICE)
    sequence = Sequence(1, 9)
    cache = ArenaCache(shape)
    prompt = cache.prompt(8)
    prompt.kv[:, 0] = sequence.kv[:, 0, :, :8].to(dtype)
    prompt.length = 8
    together = cache.rows()
    step = together.decode(together.add([(prompt, 1)]))
    k, v = sequence.kv[:, 0, None, :, 8:].to(dtype)
    q = sequence.q[0, None, :, 8:].to(dtype)
    output = step.attend(0, Heads(q, k, v, SCALING, None))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        output[0].float(), sequence.expected(0, 8, 9), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("name", ["arenas", "gather"])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_caps_and_sinks(name: str, softcap: float | None, with_sinks: bool) -> None:
    """Of a sequence that is read in two pieces and then grows by two rows."""
    cache = CACHES[name](SHAPE)
    sequence, sinks = Sequence(3, 40), torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None

    def step(used: Any, begin: int, end: int, times: int) -> None:
        for layer, window in enumerate(WINDOWS):
            q = sequence.q[layer, None].double()
            k, v = sequence.kv[:, layer, None].double()
            whole = Heads(q, k, v, SCALING, window, softcap, sinks)
            right = attend(whole._replace(q=q[:, :, :end], k=k[:, :, :end], v=v[:, :, :end]))
            new = [x[:, :, begin:end].float().repeat(1, 1, times, 1) for x in (q, k, v)]
            ours = used.attend(layer, Heads(*new, SCALING, window, softcap, sinks))
            expected = right[:, :, begin:].transpose(1, 2).float().repeat(1, times, 1, 1)
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
        used.finish()

    prompt = cache.prompt(30)
    step(cache.read([(prompt, 13)]), 0, 13, 1)
    step(cache.read([(prompt, 17)]), 13, 30, 1)
    together = cache.rows()
    rows = together.add([(prompt, 2)])
    for at in range(30, 35):
        step(together.decode(rows), at, at + 1, 2)


def test_samples_share_the_whole_pages_of_their_prompt() -> None:
    cache = PageCache(SHAPE, gathered_attention, page=PAGE)
    sequence = Sequence(1, 2 * PAGE + 40)
    length = 2 * PAGE + 3
    prompt = cache.prompt(length)
    feed(cache.read([(prompt, length)]), [(sequence, 0, length)])
    together = cache.rows()
    first, second = together.add([(prompt, 2)])
    assert first.pages[:2] == second.pages[:2] == prompt.pages[:2]
    assert len({first.pages[2], second.pages[2], prompt.pages[2]}) == 3
    cache.end(prompt)
    page_bytes = cache.prompt_bytes(1)
    used = len(cache.pool.refs) - 1 - len(cache.pool.free)
    assert used * page_bytes == cache.prompt_bytes(2 * PAGE) + 2 * cache.row_bytes(length, 1)
    for begin in range(length, length + 30):  # the one does not see what the other draws
        feed(together.decode([first, second]), [(sequence, begin, begin + 1)] * 2)
    together.remove([first])
    feed(together.decode([second]), [(sequence, second.length, second.length + 1)])
    together.remove([second])
    assert_nothing_is_kept(cache, together)


@pytest.mark.parametrize("name", ["gather", "varlen"])
def test_pages_that_were_freed_are_used_again(name: str) -> None:
    cache = CACHES[name](SHAPE)
    sizes = []
    for i in range(5):
        sequence = Sequence(i, 50)
        prompt = cache.prompt(40)
        feed(cache.read([(prompt, 40)]), [(sequence, 0, 40)])
        together = cache.rows()
        rows = together.add([(prompt, 3)])
        cache.end(prompt)
        for at in range(40, 50):
            feed(together.decode(rows), [(sequence, at, at + 1)] * 3)
        for row in rows:
            together.remove([row])
        sizes.append(len(cache.pool.refs))
    assert len(set(sizes)) == 1
    assert PAGE_TOKENS % 256 == 0, "flash attention takes no others"
