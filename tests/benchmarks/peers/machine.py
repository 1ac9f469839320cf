"""The machine that measures, and its limits: matrix products at the shapes used, memory bandwidth.

A figure is worth little without them: processors differ by a factor of three, ratios by less.
"""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.benchmarks.peers.shapes import config_of
from weaver.engine.torch.kernels import kernel_of

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 2048
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
COPIED = 2**28
"""Bytes of the array whose copy is timed."""


def machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    known = set(flags[1].split()) if flags else set()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model[1] if model else platform.processor(),
        "flags": [flag for flag in FLAGS if flag in known],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def limits(shape: str, *, rows: int = ROWS) -> dict[str, Any]:
    """In float32 on the CPU.

    `train_tokens_per_s` is what the products of a LoRA pass allow alone: of each frozen weight one
    forward and one backward; `decode_tokens_per_s` reads each weight once a token, at one row.
    """
    config = config_of(shape)
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = [
        (heads * config.head_dim, hidden),
        (kv * config.head_dim, hidden),
        (kv * config.head_dim, hidden),
        (hidden, heads * config.head_dim),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    counted = [(one, config.num_hidden_layers) for one in layer]
    counted.append(((config.vocab_size, hidden), 1))
    spent, products, weights = 0.0, {}, 0
    for (out, into), times in counted:
        name = f"{rows} x {into} x {out}"
        if name not in products:
            products[name] = _product(rows, into, out)
        spent += times * sum(products[name]["seconds"])
        weights += times * out * into
    bandwidth = _bandwidth()
    gflops = {
        name: round(2e-9 * rows * _size(name) / one["seconds"][0]) for name, one in products.items()
    }
    return {
        "gemm_gflops": gflops,
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "train_tokens_per_s": rows / spent,
        "decode_tokens_per_s": bandwidth / (4 * weights),
    }


def _size(name: str) -> int:
    _, into, out = name.split(" x ")
    return int(into) * int(out)


def _product(rows: int, into: int, out: int) -> dict[str, Any]:
    """Seconds of x W^T and of y W, each the best of a plain and a prepacked weight."""
    x, y, weight = torch.randn(rows, into), torch.randn(rows, out), torch.randn(out, into)
    kernel = kernel_of(weight)
    forward = min(
        _best(lambda: torch.nn.functional.linear(x, weight)),
        _best(lambda: kernel.project(x, None)),
    )
    back = min(_best(lambda: y @ weight), _best(lambda: kernel.project_back(y)))
    return {"seconds": (forward, back)}


def _bandwidth() -> float:
    """Bytes a second that are read, of a copy."""
    source = torch.zeros(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / _best(lambda: target.copy_(source)) / 2


def _best(work: Callable[[], Any], *, times: int = 5) -> float:
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
