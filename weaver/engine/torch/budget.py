"""`Budget`: how many samples run at once, and what their keys and values may take.

`TorchSampler` keeps to it, and `weaver doctor` shows it before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver.engine.torch.device import size_text
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.memory import shares
from weaver.types import Quantize

if TYPE_CHECKING:
    import torch

    from weaver.engine.torch.catalog import ModelFacts

CPU_ROWS = 64
"""More at once make no token cheaper there."""
MAX_ROWS = 256
"""On other devices."""
FIXED_TOKENS = 2**15
"""Where the cache must not depend on the device's memory, or that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """As settings and memory have it; what depends on memory changes with the models only.

    Where bytes or rows are set, or `deterministic`, they are the same on every machine with the
    same kind of device.
    """

    device: torch.device
    dtype: torch.dtype
    memory: int | None
    """Bytes that were free on the device when the engine began; None is not known."""
    quantize: Quantize = "none"
    set_rows: int = 0
    """0 takes them by the device."""
    set_bytes: int = 0
    """0 takes them by the memory."""
    deterministic: bool = False

    @property
    def rows(self) -> int:
        """Samples that run at once."""
        return self.set_rows or (CPU_ROWS if self.device.type == "cpu" else MAX_ROWS)

    def cache_bytes(self, facts: ModelFacts, *, beside: int = 0) -> int:
        """Of keys and values, where other models may take so many bytes."""
        if self.set_bytes:
            return self.set_bytes
        if self.deterministic or self.memory is None:
            return FIXED_TOKENS * self._shape(facts).token_bytes
        return shares(
            facts,
            free=self.memory,
            dtype=self.dtype,
            device=self.device,
            quantize=self.quantize,
            beside=beside,
        ).cache

    def text(self, facts: ModelFacts, *, beside: int = 0) -> str:
        """In words."""
        size = self.cache_bytes(facts, beside=beside)
        tokens = size // self._shape(facts).token_bytes
        return f"{self.rows} at once, {size_text(size)} of keys and values ({tokens:,} tokens)"

    def _shape(self, facts: ModelFacts) -> CacheShape:
        return CacheShape.of(facts, dtype=self.dtype, device=self.device)
