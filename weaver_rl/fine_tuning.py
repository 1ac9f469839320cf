"""`fine_tune`: learning given answers in one blocking call, as `train` learns from a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weaver import AsyncTrainingClient
from weaver_rl.algorithms.run import Run, open_run
from weaver_rl.algorithms.supervised import SupervisedPlan, TooLong, supervised
from weaver_rl.data import check_tasks, digest
from weaver_rl.evaluation import Evaluate
from weaver_rl.guard import name_of
from weaver_rl.plan import Schedule
from weaver_rl.trackers import Tracking
from weaver_rl.train import LORA, Trained, chosen_plan, in_one_call

__all__ = ["fine_tune"]

DEFAULT = SupervisedPlan(evaluate_every=20)
"""What `fine_tune` does unless it is told otherwise."""


def fine_tune(
    model: str,
    examples: Sequence[Mapping[str, Any]],
    *,
    plan: SupervisedPlan | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_tokens: int = 4096,
    learning_rate: float | Schedule | None = None,
    roles: Sequence[str] = ("assistant",),
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    held_out: Sequence[Mapping[str, Any]] = (),
    evaluate: Evaluate | None = None,
    evaluate_every: int = 20,
    lora_config: Mapping[str, object] | None = None,
    seed: int = 0,
    name: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 50,
    display: bool = True,
    wandb_project: str | None = None,
    track: Sequence[Tracking] = (),
    base_url: str | None = None,
) -> Trained:
    """Trains a LoRA adapter by `supervised` on examples, in any of its forms.

    Args:
        examples: `{"prompt": ..., "completion": ...}`, `{"messages": [...]}` and so on.
        plan: in place of the arguments that it has, such as `epochs`.
        held_out: examples whose mean loss per token is logged as `eval/loss`.
        evaluate: another measure of the weights, such as `rl.evaluator(tasks, reward=exact)`.
        lora_config: rank 8, alpha 32 by default.
        name: of the run, on the service and for trackers; None: that of the folder.
        folder: gets config, metrics, checkpoints and the report; None: nothing.
        resume: goes on in that folder behind its last checkpoint, exactly, if there is one. What
            has finished there is answered at once.
        wandb_project: another place for the numbers; see `open_run`.
        track: more such places.
        base_url: a server; None: WEAVER_BASE_URL, or this process.

    The others are those of `SupervisedPlan`.

    Raises:
        ConfigError, InvalidRequestError: before anything is trained; names the argument, or row,
            field and fix of an example.
        ConflictError: the folder holds a run and `resume` is off.
    """
    own = SupervisedPlan(
        epochs=epochs,
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        roles=tuple(roles),
        max_length=max_length,
        too_long=too_long,
        evaluate_every=evaluate_every,
        seed=seed,
    )
    chosen = chosen_plan(plan, own, DEFAULT)
    check_tasks(examples, fields=(), source="examples")
    lora = dict(lora_config or LORA)

    async def play(trainer: AsyncTrainingClient, run: Run) -> Mapping[str, float]:
        result = await supervised(
            trainer, examples, chosen, held_out=held_out, run=run, evaluate=evaluate
        )
        return result.metrics

    asked = [digest(held_out), evaluate and name_of(evaluate)]
    opening = open_run(
        Path(folder) if folder is not None else None,
        {"model": model, "lora_config": lora, **chosen.as_config(), "evaluation": asked},
        tasks=examples,
        steps=chosen.steps,
        name=name,
        tags=("supervised",),
        resume=resume,
        checkpoint_every=checkpoint_every,
        display=display,
        wandb_project=wandb_project,
        track=track,
    )
    return in_one_call(
        opening, play, model=model, lora_config=lora, seed=chosen.seed, base_url=base_url
    )
