"""The frozen projection: prepacked and plain paths, values, gradients, segments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear

from tests.engine.conftest import DEVICE, of_the_cpu
from weaver.engine.torch import kernels
from weaver.engine.torch.kernels import PREPACK_MIN_SIZE, Prepacked, prepackable
from weaver.engine.torch.linear import FrozenLinear, Projection
from weaver.engine.torch.lora import Adapter, LoraPair
from weaver.engine.torch.routing import Routing
from weaver.errors import EngineError

SMALL, LARGE = (24, 40), (384, 520)


def make(
    shape: tuple[int, int], *, bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Linear, FrozenLinear, Routing]:
    plain = torch.nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(plain.parameters()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    plain.to(DEVICE)
    routing = Routing()
    return plain, FrozenLinear(Projection([plain], paths=["layer"]), routing=routing), routing


def adapter(shape: tuple[int, int], seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(s, generator=generator).to(DEVICE) * 0.1 for s in ((3, shape[1]), (shape[0], 3))
    )
    return Adapter({"layer": LoraPair(a.requires_grad_(), b.requires_grad_())}, 0.5 + seed)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_values_and_gradients_by_segment_equal_plain_autograd(
    shape: tuple[int, int], bias: bool, rows: int
) -> None:
    plain, frozen, routing = make(shape, bias=bias)
    one, two = adapter(shape, 1), adapter(shape, 2)
    lengths, adapters = (rows, rows, 2, rows), (one, None, two, one)
    x = torch.randn(sum(lengths), shape[1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    x.requires_grad_()
    with routing.of(lengths, adapters):
        y = frozen(x[None])[0]
    weights = []
    for a in adapters:
        update = 0 if a is None else a.scale * a.pairs["layer"].b @ a.pairs["layer"].a
        weights.append(plain.weight + update)
    pieces = zip(x.split(lengths), weights, strict=True)
    expected = torch.cat([linear(rows_, weight, plain.bias) for rows_, weight in pieces])
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-5)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    inputs = [x, *one.tensors().values(), *two.tensors().values()]
    ours = torch.autograd.grad(y, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm()) < 1e-5 * float(other.norm())


@of_the_cpu
def test_large_weights_are_kept_packed_and_given_back_exactly() -> None:
    plain, frozen, _ = make(LARGE, bias=False)
    assert plain.weight.numel() >= PREPACK_MIN_SIZE
    assert torch.equal(frozen.weight, plain.weight)
    assert isinstance(frozen.projection.kernel, Prepacked) == prepackable(torch.float32)
    small_plain, small, _ = make(SMALL, bias=False)
    assert small.weight.data_ptr() == small_plain.weight.data_ptr()


def test_the_packed_path_gives_the_same_bits_again() -> None:
    x = torch.randn(37, LARGE[1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    first, second = (make(LARGE, bias=True)[1].projection.project(x) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("capable", [True, False])
def test_bfloat16_weights_are_as_close_as_their_precision(
    monkeypatch: pytest.MonkeyPatch, capable: bool
) -> None:
    if not capable:
        monkeypatch.setattr(kernels, "prepackable", lambda dtype: False)
    plain, frozen, _ = make(LARGE, bias=True, dtype=torch.bfloat16)
    x = torch.randn(37, LARGE[1], generator=torch.Generator().manual_seed(3)).to(DEVICE).bfloat16()
    weight, bias = plain.weight.detach().double(), plain.bias.detach().double()
    y = linear(x.double(), weight, bias)
    torch.testing.assert_close(frozen.projection.project(x).double(), y, atol=2e-2, rtol=2e-2)
    back = frozen.projection.project_back(y.bfloat16()).double()
    torch.testing.assert_close(back, y.bfloat16().double() @ weight, atol=5e-2, rtol=5e-2)


@of_the_cpu
@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_a_lesser_processor_gets_plain_products_where_it_cannot_prepack(isa: str) -> None:
    """oneDNN and torch are told to use less than this machine has, and then asked."""
    program = (
        "import torch; from tests.engine.test_linear import *\n"
        "test_bfloat16_weights_are_as_close_as_their_precision(pytest.MonkeyPatch(), True)\n"
        "test_large_weights_are_kept_packed_and_given_back_exactly()\n"
        "for rows in (1, 7, 600):\n"
        "    test_values_and_gradients_by_segment_equal_plain_autograd(LARGE, True, rows)\n"
        "print(prepackable(torch.bfloat16))"
    )
    lesser = {
        "ONEDNN_MAX_CPU_ISA": isa,
        "ATEN_CPU_CAPABILITY": "avx2" if isa == "AVX2" else "default",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **lesser},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_rows_that_do_not_fit_the_routing_are_a_defect() -> None:
    _, frozen, routing = make(SMALL, bias=False)
    with routing.of((3,), (None,)), pytest.raises(EngineError, match="4 rows"):
        frozen(torch.zeros(4, SMALL[1]))
    with pytest.raises(EngineError, match="None"):
        frozen(torch.zeros(4, SMALL[1]))
