"""Seeds as a pure function of what they are for, so that a resumed run draws what it would have."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^63) for `(run's seed, step, problem, sample, turn)` or any such numbers."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
