"""Log-probabilities over large vocabularies: ours against torch's own log-softmax, interleaved.

Forward and backward of the trainer's chunks, and of few rows; the sampler's draw takes torch's
softmax and adds one sum.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from tests.benchmarks.figures import Figure
from weaver.engine.torch.logprobs import scored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPES = ((256, 32_768), (32, 262_144), (1, 32_768), (32, 32_768))
ROUNDS = 7


def theirs(z: torch.Tensor, targets: torch.Tensor, entropy: bool) -> torch.Tensor:
    log_p = z.log_softmax(-1)
    values = log_p.gather(1, targets[:, None])
    return values.sum() + (-(log_p.exp() * log_p).sum().detach() if entropy else 0)


def ours(z: torch.Tensor, targets: torch.Tensor, entropy: bool) -> torch.Tensor:
    values, entropies = scored(z, targets, None, entropy)
    return values.sum() + entropies.sum().detach()


def seconds(work: Callable[..., torch.Tensor], z: torch.Tensor, *args: object) -> float:
    z = z.clone().requires_grad_()
    begin = perf_counter()
    work(z, *args).backward()  # type: ignore[no-untyped-call]
    return perf_counter() - begin


def figures(smoke: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for shape in SHAPES[-2:-1] if smoke else SHAPES:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(shape, generator=generator) * 5
        targets = torch.randint(0, shape[1], (shape[0],), generator=generator)
        for entropy in (False, True):
            rounds = [
                [seconds(work, z, targets, entropy) for work in (theirs, ours)]
                for _ in range(1 if smoke else ROUNDS)
            ]
            name = f"{list(shape)}{' with entropy' if entropy else ''}"
            yield Figure(f"{name}: ours", tuple(1e3 * ours_s for _, ours_s in rounds), "ms")
            ratios = tuple(ours_s / torch_s for torch_s, ours_s in rounds)
            yield Figure(f"{name}: ours by torch's", ratios, "times")
