"""Small groups and segments for the tests of the RL layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver_rl.types import Failure, Group, Rollout, Segment, Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILURE = Failure("reward", "raised", "ValueError: no")


def segment(
    prompt: Sequence[int], sampled: Sequence[int], *, logprob: float = -0.5, version: int = 0
) -> Segment:
    n, m = len(prompt), len(sampled)
    logprobs = (0.0,) * n + tuple(logprob - 0.01 * i for i in range(m))
    return Segment(
        tokens=(*prompt, *sampled),
        mask=(0,) * n + (1,) * m,
        logprobs=logprobs,
        sampling_logprobs=tuple(2 * lp for lp in logprobs),
        versions=(-1,) * n + (version,) * m,
    )


def rollout(reward: float | None, *segments: Segment) -> Rollout:
    """None: a failed one."""
    return Rollout(
        task={"prompt": "x"},
        trajectory=Trajectory(segments=segments or (segment([1, 2], [3, 4]),), turns=1),
        reward=reward or 0.0,
        failure=FAILURE if reward is None else None,
    )


def group(*rewards: float | None) -> Group:
    return Group(task={"prompt": "x"}, rollouts=tuple(rollout(r) for r in rewards))
