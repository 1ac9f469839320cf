"""Plain words for numbers that look wrong; the display and the report show them.

Pure: from the metrics of the steps so far (names of `weaver_rl.metrics`) to hints, most serious
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver_rl.gap import ROUNDING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KL_LIMIT = 0.5
"""Nats per token between the policy and the one that sampled: far outside any trust region."""
COLLAPSE = 0.02
"""The share of its first entropy below which a policy has stopped exploring."""
ABOVE = (
    (
        "rollout/failed_fraction",
        0.0,
        "failures",
        "{:.0%} of the rollouts failed and are left out of training. The first traceback is in the "
        "log; try the reward with weaver_rl.check(reward, tasks).",
    ),
    (
        "train/kl_k3",
        KL_LIMIT,
        "kl",
        "The policy moved {:.2g} nats per token away from the one that sampled. "
        "Lower the learning rate, take fewer passes, or use a clipped loss (ppo).",
    ),
    (
        "rollout/truncated_fraction",
        0.9,
        "truncated",
        "{:.0%} of the replies were cut off by max_tokens. "
        "Raise it, or give a stop string, such as a newline.",
    ),
)
"""Metric, the most that is normal, the hint's name and text."""


def find_hints(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What looks wrong at the last step of `history`, oldest step first. {} is good news.

    By stable names: `{"gap": "Trainer and sampler disagree by up to 0.02 nats ..."}`.
    """
    if not history:
        return {}
    last = history[-1]
    first = next((row for row in history if "policy/surprise" in row), last)
    found = {
        name: text.format(last[metric])
        for metric, limit, name, text in ABOVE
        if last.get(metric, 0.0) > limit
    }
    gap, rounding = last.get("gap/max", 0.0), last.get("gap/rounding", ROUNDING["float32"])
    if gap > rounding:
        found["gap"] = (
            f"Trainer and sampler disagree by up to {gap:.3g} nats on a token; rounding costs at "
            f"most {rounding:.3g}. Check that both use the same weights and temperature."
        )
    # Centred advantages make the loss of a first on-policy pass 0 while its gradient is not.
    if last.get("train/loss") == 0.0 == last.get("train/grad_norm", 0.0):
        found["loss_zero"] = (
            "The loss and its gradient are exactly 0: nothing is learned. "
            "Look at the advantages (all rewards equal?) and at the weights (all masked?)."
        )
    mean = last.get("reward/mean", float("nan"))
    equal = last.get("groups/zero_variance_fraction", 0.0) >= 1 <= last.get("groups/count", 0.0)
    if equal and mean >= 1 and mean >= last.get("reward/max", mean):
        found["solved"] = "Every reply has the full reward: the tasks are solved. Stop here."
    elif equal:
        found["rewards_equal"] = (
            "In every group all rewards are equal, so there is nothing to compare. "
            "Use more samples a task, easier tasks, a higher temperature or partial credit."
        )
    before, now = first.get("policy/surprise", 0.0), last.get("policy/surprise", 0.0)
    if 0 <= now < COLLAPSE * before and last.get("reward/mean", 1.0) < 0.9:
        found["collapse"] = (
            f"The entropy fell from {before:.2g} to {now:.2g} nats before the tasks were solved: "
            "the policy no longer explores. Lower the learning rate or add entropy_coef."
        )
    return found
