"""`Task`: a job on its way through the passes of its model, and what one pass computes.

`TorchTrainer` makes one for each job, and plans the passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn.utils import get_total_norm

from weaver import errors, types
from weaver.engine.base import GradientJob
from weaver.engine.torch.logprobs import Scores
from weaver.engine.torch.memory import Plan
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.objective import Objective, scores_asked
from weaver.engine.torch.packing import Share, pack
from weaver.engine.torch.scalar import sequence_scores
from weaver.engine.torch.training_run import Run
from weaver.tensors import TensorData

Alive = Sequence[tuple["Task", Share]]
"""The shares of a pass whose tasks have not failed so far."""


def _added(total: list[torch.Tensor] | None, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """`total` plus `parts`, in the place of `total` where there is one."""
    if total is None:
        return parts
    torch._foreach_add_(total, parts)
    return total


@dataclass(slots=True, eq=False)
class Task:
    """A job on its way through the passes."""

    job: GradientJob
    run: Run
    objective: Objective
    gradient: list[torch.Tensor] | None = None
    """Kept apart from the run's until the whole job has succeeded."""
    logprobs: dict[int, TensorData] = field(default_factory=dict)
    """Or scores."""
    error: errors.WeaverError | None = None

    def fail(self, what: str, *, field: str) -> None:
        self.error = errors.NonFiniteError(
            f"{what} is not finite; this call added nothing to the gradient.",
            field=field,
            hint="Look for extreme logprobs or advantages, or go back to an earlier checkpoint.",
        )

    def check_gradient(self) -> None:
        if self.error is None and self.gradient:
            if not get_total_norm(self.gradient).isfinite():
                self.fail("the gradient of a finite loss", field="datums")

    def finish(self) -> types.ForwardBackwardResult | errors.WeaverError:
        """The result, after the gradient was added to the run; or the error."""
        metrics = self.objective.metrics()
        if self.error is None:
            if self.job.backward and self.gradient is None:
                self.gradient = [torch.zeros_like(p) for p in self.run.parameters()]
            broken = [name for name, value in metrics.items() if not math.isfinite(value)]
            self.check_gradient()
            if self.error is None and broken:
                self.fail(f"the metric {broken[0]!r} of a finite loss", field="datums")
        if self.error is not None:
            return self.error
        if self.gradient is not None:
            self.run.gradient = _added(self.run.gradient, self.gradient)
        return types.ForwardBackwardResult(
            loss_fn_outputs=tuple(
                {self.objective.output: self.logprobs[i]} for i in range(len(self.job.datums))
            ),
            metrics=metrics,
        )


def run_pass(alive: Alive, model: LoadedModel, plan: Plan) -> None:
    """One pass of the model, there and, where gradients are enabled, back.

    A divided model makes each, whatever is alive in it: others wait for that.
    """
    loss, tasks = model.run(partial(_loss, alive, model, plan))
    if loss is not None and loss.requires_grad:
        _differentiate(tasks, loss, model)


def _loss(alive: Alive, model: LoadedModel, plan: Plan) -> tuple[torch.Tensor | None, list[Task]]:
    """That of several tasks, and those that have not failed."""
    if not alive and model.parts is not None:
        hidden = model.hidden_states(pack([[0]], adapters=[None], device=model.device))
        return model.parts.tied(None, hidden), []
    riding = [(task, task.objective.datums(share.datums)) for task, share in alive]
    inputs = [(task, i) for task, datums in riding for i in datums]
    batch = pack(
        [task.job.datums[i].model_input.to_ints() for task, i in inputs],
        adapters=[task.run.adapter for task, _ in inputs],
        device=model.device,
    )
    rows = [sum(task.objective.rows[i] for i in datums) for task, datums in riding]
    hidden = model.hidden_states(batch, recompute=plan.layers_recomputed(batch.lengths))
    if riding[0][0].run.head is None:
        objectives = [(task.objective, datums) for task, datums in riding]
        scores = scores_asked(objectives, rows, model, batch, hidden, chunk=plan.footprint.chunk)
    else:
        scores = Scores(sequence_scores(hidden, batch), None)
    losses: dict[Task, torch.Tensor] = {}
    for (task, datums), size, end in zip(riding, rows, accumulate(rows), strict=True):
        loss = _score_share(task, datums, scores.rows(end - size, end))
        if task.error is None:
            losses[task] = loss
    total = torch.stack(list(losses.values())).sum() if losses else None
    return total if model.parts is None else model.parts.tied(total, hidden), list(losses)


def _score_share(task: Task, datums: Sequence[int], scores: Scores) -> torch.Tensor:
    """The share's loss; keeps what it was made of, or marks the task as failed."""
    loss_D = task.objective.add(datums, scores)
    pieces = task.objective.of_datums(datums, scores.logprobs.detach().cpu())
    for datum, lp, loss in zip(datums, pieces, loss_D.tolist(), strict=True):
        piece: Any = lp.numpy()
        if not np.isfinite(piece).all():
            what = "a log-probability" if task.run.head is None else "a score"
            task.fail(what, field=f"datums[{datum}]")
        elif not np.isfinite(loss):
            task.fail("the loss", field=f"datums[{datum}]")
        task.logprobs[datum] = TensorData(piece)
    return loss_D.sum()


def _differentiate(tasks: Sequence[Task], loss: torch.Tensor, model: LoadedModel) -> None:
    if model.parts is not None and model.trainable:
        loss.backward()  # type: ignore[no-untyped-call]
        return  # the parts of all ranks' sums lie in the model
    parameters = [task.run.parameters() for task in tasks]
    flat = [p for group in parameters for p in group]
    if model.parts is not None:
        gradients = iter(model.parts.gradients(loss, flat))
    else:
        gradients = iter(torch.autograd.grad(loss, flat, materialize_grads=True))
    for task, group in zip(tasks, parameters, strict=True):
        task.gradient = _added(task.gradient, [next(gradients) for _ in group])
