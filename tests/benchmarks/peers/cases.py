"""What is measured, and what is to be reached: the cases of `python -m tests.benchmarks peers`.

A `Load` says what one round is; `worker_weaver` and the workers of the peers carry it out, each in
its own way. Lengths and counts are tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Peer = Literal["peft", "vllm", "trl", "weaver"]
MOST_RAGGED = 800
SMOKE_TOKENS = 16
"""What a smoke run cuts every length to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One round."""

    kind: Literal["train", "sample", "grpo", "publish", "first_step", "first_token", "memory"]
    lengths: tuple[int, ...] = ()
    """Of the datums of one tenant, or of the replies."""
    prompt: int = 32
    shared: int = 0
    """Tokens with which all prompts begin."""
    samples: int = 1
    """Of each prompt."""
    learned: float = 1.0
    """The share of each datum's tokens, its last, that are trained."""
    tenants: int = 1
    """Or adapters that are sampled from."""
    rank: int = 32
    turn: int = 0
    """Which round it is: data differ from one to the next, and are the same for both sides."""
    merged: bool = True
    """Whether tenants ask at once, or one after another."""

    @property
    def tokens(self) -> int:
        """Trained, or sampled."""
        return sum(self.lengths) * (self.tenants if self.kind == "train" else self.samples)

    def smaller(self) -> Load:
        """For a smoke run."""
        return replace(
            self.warming(),
            lengths=self.warming().lengths[:4],
            prompt=min(self.prompt, 8),
            shared=min(self.shared, 16),
            samples=min(self.samples, 2),
            tenants=min(self.tenants, 2),
            rank=4,
        )

    def warming(self) -> Load:
        """What comes before the rounds that count: everything is made, few tokens are computed."""
        return replace(self, lengths=tuple(min(n, SMOKE_TOKENS) for n in self.lengths))

    @classmethod
    def of(cls, given: dict[str, Any]) -> Load:
        return cls(**{**given, "lengths": tuple(given["lengths"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    load: Load
    peer: Peer | None = "peft"
    """Whom it is measured against; `weaver` is ours with `against`, None nobody."""
    against: Load | None = None
    """What the other side does, where that differs."""
    ratio: float | None = None
    """To reach: the peer's seconds by ours; of memory, its bytes by ours."""
    memory: float | None = None
    """To reach beside: the peer's bytes by ours."""
    share: float | None = None
    """To reach: of the machine's limit, in matrix products or, of samples, in reading weights."""
    most_ms: float | None = None
    rounds: int = 5
    shape: str = "60m"

    @property
    def other(self) -> Load:
        return self.against or self.load


def ragged(count: int = 8) -> tuple[int, ...]:
    steps = (64, 80, 96, 128, 160, 224, 352, MOST_RAGGED)
    return tuple(steps[i % len(steps)] for i in range(count))


def long_tailed(count: int, longest: int) -> tuple[int, ...]:
    """Lengths of replies: half below 13, some as long as can be."""
    rng = random.Random(0)
    lengths = (round(rng.lognormvariate(2.5, 1.0)) for _ in range(count))
    return tuple(max(1, min(longest, n)) for n in lengths)


def _train(*lengths: int, **settings: Any) -> Load:
    return Load(kind="train", lengths=lengths, **settings)


def _sample(*lengths: int, **settings: Any) -> Load:
    return Load(kind="sample", lengths=lengths, **settings)


CASES = (
    Case(name="train 8 x 256", load=_train(*(256,) * 8), ratio=1.3, share=0.65),
    Case(name="train 8 x 1024", load=_train(*(1024,) * 8), ratio=1.3, share=0.65, rounds=3),
    Case(name="train ragged 64 to 800", load=_train(*ragged()), ratio=4, rounds=3),
    Case(name="train ragged, 75 % masked", load=_train(*ragged(), learned=0.25), ratio=5, rounds=3),
    Case(name="train 2 x 64", load=_train(64, 64), ratio=1.3),
    Case(name="train 8 x 256, rank 8", load=_train(*(256,) * 8, rank=8), ratio=1.3, share=0.65),
    Case(name="train 8 x 256, rank 128", load=_train(*(256,) * 8, rank=128), ratio=1.3, share=0.65),
    Case(
        name="16 tenants of 2 x 64, theirs one after another",
        load=_train(64, 64, tenants=16),
        ratio=1.5,
        share=0.65,
    ),
    Case(
        name="16 tenants of 1 x 8, ours one after another",
        load=_train(8, tenants=16),
        against=_train(8, tenants=16, merged=False),
        peer="weaver",
        ratio=3,
    ),
    Case(name="sample 1 x 128", load=_sample(128), ratio=1.6),
    Case(name="sample 1 prompt x 16 x 128", load=_sample(128, samples=16), ratio=2.2),
    Case(name="sample 32 x 64", load=_sample(*(64,) * 32), ratio=2.2),
    Case(name="sample 256, long-tailed", load=_sample(*long_tailed(256, 64)), ratio=4, rounds=3),
    Case(
        name="sample 32 x 16, 512 of each prompt shared",
        load=_sample(*(16,) * 32, shared=512),
        rounds=3,
    ),
    Case(
        name="sample 32 x 64, 8 adapters, vLLM",
        load=_sample(*(64,) * 32, tenants=8),
        peer="vllm",
        ratio=4,
        rounds=3,
    ),
    Case(
        name="a GRPO step of 16 x 128, TRL",
        load=Load(kind="grpo", lengths=(128,), samples=16),
        peer="trl",
        ratio=4,
        rounds=3,
    ),
    Case(name="weights to the sampler", load=Load(kind="publish"), peer=None, most_ms=20),
    Case(name="process start to first step", load=Load(kind="first_step"), peer=None, most_ms=5000),
    Case(
        name="process start to first token, 270M",
        load=Load(kind="first_token", lengths=(1,)),
        ratio=1 / 1.2,
        memory=1 / 1.4,
        rounds=3,
        shape="270m",
    ),
    Case(
        name="peak memory, 8 x 512, vocabulary 152k",
        load=Load(kind="memory", lengths=(512,) * 8),
        ratio=2,
        rounds=1,
        shape="60m-152k",
    ),
)

ON_CUDA = (
    Case(name="train 8 x 1024", load=_train(*(1024,) * 8), ratio=1.2, share=0.45),
    Case(name="train 1 x 32768", load=_train(32_768), peer=None, rounds=1),
    Case(name="train ragged 64 to 800", load=_train(*ragged()), rounds=3),
    Case(
        name="16 tenants of 2 x 64, theirs one after another",
        load=_train(64, 64, tenants=16),
        rounds=3,
    ),
    Case(name="sample 1 x 128", load=_sample(128), rounds=3),
    Case(name="sample 64 x 128", load=_sample(*(128,) * 64), share=0.5, rounds=3),
    Case(name="weights to the sampler", load=Load(kind="publish"), peer=None),
)
"""What `make gpu` measures, at `--shape 0.6b` and `8b`."""


def cases_of(device: str | None) -> Sequence[Case]:
    """Those of a machine, by the name of its CUDA device, if it has one."""
    return CASES if device is None else ON_CUDA


GROWTH: dict[str, list[tuple[int, Load, str]]] = {
    "trained tokens": [(128 * n, _train(*(128,) * n), "") for n in (1, 2, 4, 8, 16)],
    "thousands of vocabulary": [(n, _train(128), f"-{n}k") for n in (32, 64, 152)],
    "rank": [(n, _train(*(128,) * 4, rank=n), "") for n in (1, 8, 32, 128)],
    "tenants": [(n, _train(64, 64, tenants=n), "") for n in (1, 2, 4, 8, 16)],
    "samples": [(n, _sample(32, samples=n), "") for n in (1, 4, 16, 64)],
}
"""Ours alone, by what grows: its size, a round, an addition to the model's shape. For the plots."""
