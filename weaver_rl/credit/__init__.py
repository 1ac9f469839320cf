"""Credit: how much each sampled token is to be praised. Plans take one, loops call it each step.

A credit is an async function of a step's groups that answers `Marks` for each rollout. Those here
are small and go together: `total(outcome("standardised"), turns(), kl(reference, beta=0.01))`.
"""

from weaver_rl.credit.combined import total, truncated, unless, whitened
from weaver_rl.credit.models import distil, kl
from weaver_rl.credit.outcome import outcome
from weaver_rl.credit.turns import steps, turns

__all__ = ["distil", "kl", "outcome", "steps", "total", "truncated", "turns", "unless", "whitened"]
