"""`Team`: processes that compute the gradients of the same jobs together, each on its own datums.

`TorchTrainer` asks it which datums are its own, and has it merge what came of them. `ALONE` is the
team of one process; that of the ranks of a group is `weaver.engine.cluster.merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch.nn.utils import get_total_norm

from weaver.engine.torch.packing import Share, plan_passes

if TYPE_CHECKING:
    import torch

    from weaver.engine.base import GradientJob
    from weaver.engine.torch.objective import Objective
    from weaver.errors import WeaverError
    from weaver.tensors import TensorData


class Task(Protocol):
    """A job on its way through the passes."""

    job: GradientJob
    run: Any
    objective: Objective
    gradient: list[torch.Tensor] | None
    logprobs: dict[int, TensorData]
    """By datum."""
    error: WeaverError | None


class Team(Protocol):
    def plan(
        self, lengths: Sequence[Sequence[int]], *, budget: int, merge: bool
    ) -> list[tuple[Share, ...]]:
        """The passes of this process: see `plan_passes`."""

    def settle(self, tasks: Sequence[Any]) -> None:
        """Behind all passes: what each process has of each `Task` becomes what all have of it.

        A task that has failed in one has failed in all.
        """

    def norm(self, gradient: Sequence[torch.Tensor], *, divided: bool) -> torch.Tensor:
        """Of all of it, of which each process has a part where it is divided."""


class _Alone:
    def plan(
        self, lengths: Sequence[Sequence[int]], *, budget: int, merge: bool
    ) -> list[tuple[Share, ...]]:
        return plan_passes(lengths, budget=budget, merge=merge)

    def settle(self, tasks: Sequence[Any]) -> None:
        """What one process has is all."""

    def norm(self, gradient: Sequence[torch.Tensor], *, divided: bool) -> torch.Tensor:
        return get_total_norm(gradient)


ALONE: Team = _Alone()
