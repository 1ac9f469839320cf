"""What a benchmark says: figures, each of one value or of rounds, with the bound it is held to.

Every module named in `BENCHMARKS` of `__main__` has a function `figures(smoke)` that yields them;
`__main__` prints them and writes them to a file, beside the machine that measured.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What a processor may have that its speed hangs on."""


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    values: tuple[float, ...]
    """Of each round, or a single one."""
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the bound holds; None without one."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return None if self.at_least is None else self.median >= self.at_least

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "low": min(self.values),
            "high": max(self.values),
            "rounds": len(self.values),
            "at_most": self.at_most,
            "at_least": self.at_least,
            "reached": self.reached,
        }

    def __str__(self) -> str:
        spread = f" ({min(self.values):.4g}-{max(self.values):.4g})" if len(self.values) > 1 else ""
        bound = "" if self.at_most is None else f"at most {self.at_most:g}"
        bound += "" if self.at_least is None else f"at least {self.at_least:g}"
        verdict = {None: "", True: ": reached", False: ": missed"}[self.reached]
        return f"{self.name:<58} {self.median:>9.4g} {self.unit}{spread}  {bound}{verdict}".rstrip()


def machine() -> dict[str, Any]:
    """The processor, what it can do, cores, memory, and what ran on it just before."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model, flags = re.search(r"model name\s*: (.*)", text), re.search(r"flags\s*: (.*)", text)
    known = flags[1].split() if flags else []
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in known],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
