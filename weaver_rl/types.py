"""The values of the RL layer: what was asked, what was sampled, and what it earned.

Rollouts make them; loops, advantages, datums, metrics and transcripts read them. All are frozen,
hold plain Python numbers, and compare by value.

Axes: P problems of a step, G samples of a problem, T tokens of a segment. Log-probabilities are in
nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from weaver import types

__all__ = ["Failure", "Group", "Reply", "Rollout", "Score", "Segment", "Task", "Trajectory"]

StopReason = types.StopReason
Task = Mapping[str, Any]
"""One problem: `{"prompt": "rev:abc=", "answer": "cba"}`; an environment decides what it needs.

A `prompt` is a text (sampled from as it is) or a list of chat messages.
"""

Place = Literal["reward", "environment", "tool", "logger", "run"]
FailureKind = Literal["raised", "timeout", "bad_value"]
FloatPG = npt.NDArray[np.float64]
BoolPG = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward or an environment may return in place of a float.

    `Score(0.5, metrics={"format": 1.0, "exact": 0.0})`
    """

    reward: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers to be averaged and logged beside the reward."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rollout has no reward. It is left out of training and counted.

    `Failure("reward", "raised", "ValueError: no digits", "Traceback (most recent call ...")`
    """

    where: Place
    kind: FailureKind
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sampled answer, as a reward or an environment sees it.

    `Reply(text="cba", tokens=(7, 6, 5, 2), logprobs=(-0.1, -0.2, -0.1, 0.0), ...)`
    """

    text: str
    """Decoded, without special tokens and without the stop string."""
    tokens: tuple[int, ...]
    """As sampled, with those that completed a stop."""
    logprobs: tuple[float, ...]
    """Log-probabilities under the policy, untempered; one for each token."""
    sampling_logprobs: tuple[float, ...]
    """Log-probabilities in the distribution that was drawn from; one for each token."""
    stop_reason: StopReason
    """`stop`, or `length` where max_tokens cut it off."""
    weights_version: int = 0
    """The optimizer step of the weights that sampled it, or its last token."""
    prompt_tokens: tuple[int, ...] = ()
    """All that the model had read before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens that the model read and wrote: one training sequence. All fields have T.

    Prompt 4 5, sampled 7 2, then 9 from the environment, then 3 sampled after one optimizer step::

        Segment(tokens=(4, 5, 7, 2, 9, 3), mask=(0, 0, 1, 1, 0, 1),
                logprobs=(0, 0, -0.1, -0.2, 0, -0.5), sampling_logprobs=(0, 0, -0.1, -0.2, 0, -0.5),
                versions=(-1, -1, 0, 0, -1, 1))
    """

    tokens: tuple[int, ...]
    mask: tuple[int, ...]
    """1 where the model sampled the token, 0 where it only read it."""
    logprobs: tuple[float, ...]
    """Log-probabilities under the policy, untempered; 0 where mask is 0."""
    sampling_logprobs: tuple[float, ...]
    """Log-probabilities in the distribution drawn from; 0 where mask is 0."""
    versions: tuple[int, ...]
    """Optimizer step of the weights that sampled the token; -1 where mask is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Everything that one agent did: usually one segment, more where history was rewritten.

    An agent behind an endpoint may have had several conversations, too.
    """

    segments: tuple[Segment, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    """For people: `({"role": "user", "content": "rev:abc="}, {"role": "assistant", ...})`."""
    stop_reason: StopReason = "stop"
    """That of the last reply."""
    turns: int = 0
    """Replies sampled."""
    reply_lengths: tuple[int, ...] = ()
    """Sampled tokens of each turn, in the order of the segments; () where there is but one."""
    turn_rewards: tuple[float, ...] = ()
    """What `Agent.reward` gave each of these turns; () where it gave nothing."""

    @property
    def num_sampled(self) -> int:
        """Sampled tokens."""
        return sum(sum(segment.mask) for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One try at a task. `reward` is 0.0 and means nothing where `failure` is set.

    `Rollout(task={"prompt": "rev:abc="}, trajectory=Trajectory(...), reward=1.0)`
    """

    task: Task
    trajectory: Trajectory
    reward: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def text(self) -> str:
        """The last thing the model said; empty if it said nothing."""
        said = [m["content"] for m in self.trajectory.messages if m["role"] == "assistant"]
        return said[-1] if said else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G rollouts of one task, which are compared with each other."""

    task: Task
    rollouts: tuple[Rollout, ...]
    spent: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)
    """Seconds of each wait for the sampler, each environment, reward and tool: see `clock`."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """The mean over the rollouts that did not fail."""
        return tuple(r.reward for r in self.rollouts if r.failure is None)

    @property
    def zero_variance(self) -> bool:
        """Whether its rewards teach nothing: all equal, up to rounding, or fewer than two."""
        rewards = self.rewards
        return len(rewards) < 2 or bool(np.ptp(rewards) <= 1e-12 * max(map(abs, (*rewards, 1.0))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """What of a step is learned: `Filtered(kept=(g1, g3), dropped=(g2,), metrics={...})`"""

    kept: tuple[Group, ...]
    """What is learned; a task that has nothing is not among them."""
    dropped: tuple[Group, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    outcomes: tuple[tuple[int, int, int], ...] = ()
    """For the curriculum: see `curriculum.Outcome`."""


def reward_matrix(groups: tuple[Group, ...] | list[Group]) -> tuple[FloatPG, BoolPG]:
    """Rewards [P, G] and which of them count [P, G]; smaller groups are filled up with False.

    Two groups, the second with a failed rollout: `[[1, 0], [1, 0]], [[True, True], [True, False]]`.
    """
    size = max((len(group.rollouts) for group in groups), default=0)
    rewards_P_G = np.zeros((len(groups), size))
    valid_P_G = np.zeros((len(groups), size), dtype=np.bool_)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group.rollouts):
            if rollout.failure is None:
                rewards_P_G[p, g] = rollout.reward
                valid_P_G[p, g] = True
    return rewards_P_G, valid_P_G
