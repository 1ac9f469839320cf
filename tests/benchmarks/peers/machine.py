"""The machine that measures, and its limits: matrix products at the shapes used, memory bandwidth.

`python -m tests.benchmarks.peers.machine SHAPE` prints both as JSON, for `run`, which asks for them
in the surroundings of its workers. A figure is worth little without them: processors differ by a
factor of three, ratios by less.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from tests.benchmarks import figures
from tests.benchmarks.peers.shapes import config_of
from weaver.engine.torch.kernels import Plain, Prepacked, prepackable

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = os.environ.get("WEAVER_TEST_DEVICE", "cpu")
"""Where both sides compute; `tests` hides GPUs unless this names one."""
ROWS = (2048, 32, 1)
"""Of a training pass, of many samples, of one."""
READ = 2**29
"""Bytes of the array that is read, far more than a cache holds."""


def machine() -> dict[str, Any]:
    on_cuda = DEVICE.startswith("cuda") and torch.cuda.is_available()
    return {
        **figures.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(DEVICE) if on_cuda else None,
        "torch": torch.__version__,
    }


def limits(shape: str) -> dict[str, Any]:
    """In float32 on the CPU and bfloat16 on CUDA, which is how both sides compute there.

    `gemm_gflops` holds, by shape and dtype, x W^T with a plain and with a prepacked weight; of
    bfloat16 one row alone where the processor has no instructions for it.
    `train_tokens_per_s` is what the products of a LoRA pass allow alone, with the faster of the
    two: of each frozen weight one forward and one backward; `decode_tokens_per_s` reads each
    weight once a token, at one row.
    """
    on_cuda = machine()["device"] is not None
    used = torch.bfloat16 if on_cuda else torch.float32
    spent, weights = 0.0, 0
    speeds: dict[str, dict[str, float]] = {}
    backward: dict[tuple[int, int], float] = {}
    counted = _weights(shape)
    for out, into in counted:
        for rows in ROWS:
            slow = rows > 1 and not (on_cuda or prepackable(torch.bfloat16))
            for dtype in (used,) if slow or on_cuda else (used, torch.bfloat16):
                name = f"{rows} x {into} x {out}, {str(dtype).removeprefix('torch.')}"
                speeds[name] = {
                    kind: 2e-9 * rows * out * into / seconds
                    for kind, seconds in _forward(rows, into, out, dtype).items()
                }
        backward[out, into] = _backward(ROWS[0], into, out, used)
    for (out, into), times in counted.items():
        name = f"{ROWS[0]} x {into} x {out}, {str(used).removeprefix('torch.')}"
        forward = 2e-9 * ROWS[0] * out * into / max(speeds[name].values())
        spent += times * (forward + backward[out, into])
        weights += times * out * into
    bandwidth = _bandwidth()
    return {
        "gemm_gflops": speeds,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "train_tokens_per_s": ROWS[0] / spent,
        "decode_tokens_per_s": bandwidth / (used.itemsize * weights),
    }


def _weights(shape: str) -> dict[tuple[int, int], int]:
    """The frozen weights of a model that tokens go through, by shape: how many there are."""
    config = config_of(shape)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, keys = (
        config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    counted: dict[tuple[int, int], int] = {(config.vocab_size, hidden): 1}
    for out, into, times in (
        (heads, hidden, 1),
        (keys, hidden, 2),
        (hidden, heads, 1),
        (inner, hidden, 2),
        (hidden, inner, 1),
    ):
        counted[out, into] = counted.get((out, into), 0) + times * config.num_hidden_layers
    return counted


def _forward(rows: int, into: int, out: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of x W^T, by how the weight is kept."""
    x = torch.randn(rows, into, device=DEVICE, dtype=dtype)
    weight = torch.randn(out, into, device=DEVICE, dtype=dtype)
    seconds = {"plain": _best(lambda: Plain(weight).project(x, None))}
    if x.device.type == "cpu" and prepackable(dtype):
        packed = Prepacked(weight)
        seconds["prepacked"] = _best(lambda: packed.project(x, None))
    return seconds


def _backward(rows: int, into: int, out: int, dtype: torch.dtype) -> float:
    """Seconds of y W, at its faster."""
    y = torch.randn(rows, out, device=DEVICE, dtype=dtype)
    weight = torch.randn(out, into, device=DEVICE, dtype=dtype)
    kinds = [Plain(weight)]
    if y.device.type == "cpu" and prepackable(dtype):
        kinds.append(Prepacked(weight))
    return min(_best(lambda kind=kind: kind.project_back(y)) for kind in kinds)


def _bandwidth() -> float:
    """Bytes a second that are read."""
    matrix = torch.ones(READ // 4 // 1024, 1024, device=DEVICE)
    vector = torch.ones(1024, device=DEVICE)
    return READ / min(_best(lambda: matrix @ vector), _best(matrix.sum))


def _best(work: Callable[[], Any], *, times: int = 4) -> float:
    """Seconds, of one call that does not count and some that do."""
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if DEVICE.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), "limits": limits(sys.argv[1])}))
