"""What a model takes in memory, estimated before it is loaded; for `weaver doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weaver.engine.torch.engine import DTYPES
from weaver.engine.torch.lora import roles
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts

ADAM_COPIES = 4
"""Of each trained value, in float32: itself, its gradient and two moments."""
CACHED_TOKENS = 4096
USABLE = 0.9
"""The rest is for activations of small batches and for everything else."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """In bytes."""

    weights: int
    adapter: int
    """A LoRA adapter of the default rank in training."""
    cache: int
    """Keys and values of one sequence of `cached_tokens`."""
    cached_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.cache

    def against(self, free: int | None) -> tuple[bool, str]:
        """Whether it fits, as far as is known, and the sum in words."""
        parts = (
            f"{_size(self.weights)} weights, {_size(self.adapter)} adapter and optimizer, "
            f"{_size(self.cache)} cache of {self.cached_tokens:,} tokens"
        )
        if free is None:
            return True, f"needs {_size(self.total)} ({parts}); what is free is not known here"
        fits = self.total <= USABLE * free
        verdict = "fits" if fits else "DOES NOT FIT; try WEAVER_DTYPE=bfloat16 or a smaller model"
        return fits, f"needs {_size(self.total)} of {_size(free)} free ({parts}): {verdict}"


def needs_of(facts: ModelFacts, *, dtype: str) -> Needs:
    """Without activations, which grow with the tokens of a pass."""
    lora = LoraConfig()
    chosen = roles(lora)
    sides = (t.in_features + t.out_features for t in facts.targets.values() if chosen[t.role])
    tokens = min(CACHED_TOKENS, facts.info.context_length)
    values = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * tokens
    size = DTYPES[dtype].itemsize
    return Needs(
        weights=facts.info.num_parameters * size,
        adapter=ADAM_COPIES * torch.float32.itemsize * lora.rank * sum(sides),
        cache=values * size,
        cached_tokens=tokens,
    )


def free_bytes(device: str) -> int | None:
    """Of the device, or of this machine (or its container) for `cpu`; None where it is not told."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    known = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        limit = int((CGROUP / "memory.max").read_text())
        known.append(limit - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # another system, or a container without a limit
        pass
    return min(known, default=None)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
