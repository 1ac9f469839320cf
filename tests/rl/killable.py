"""A short run of a loop, for `test_kill`: `python -m tests.rl.killable FOLDER LOOP`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.tasks.words import exact, reverse_tasks

STEPS = 12
TASKS = reverse_tasks(40)
EXAMPLES = [{"prompt": task["prompt"], "completion": task["answer"]} for task in TASKS]
SMALL: dict[str, Any] = {
    "steps": STEPS,
    "groups_per_step": 4,
    "group_size": 4,
    "sampling": SamplingParams(max_tokens=12),
}
MOVING = {"max_staleness": 2, "objective": rl.Objective(correction="token")}
STALENESS = {"on_policy": 0, "off_policy": 2}
LOOPS: dict[str, Any] = {
    "rejection": (
        partial(rl.rejection, tasks=TASKS, environment=rl.single_turn(exact), keep=rl.Keep()),
        rl.Plan(**SMALL),
    ),
    "in_flight": (
        partial(rl.off_policy, tasks=TASKS, environment=rl.single_turn(exact)),
        rl.Plan(**SMALL, **MOVING, in_flight="reply"),
    ),
    "supervised": (
        partial(rl.supervised, examples=EXAMPLES),
        rl.SupervisedPlan(epochs=9, steps=STEPS, batch_tokens=200),
    ),
}


def main(folder: Path, loop: str) -> None:
    if loop in LOOPS:
        anyio.run(run, folder, loop)
        return
    rl.train(
        "weaver-nano",
        TASKS,
        exact,
        **SMALL,
        max_staleness=STALENESS[loop],
        objective=rl.Objective(correction="ratio"),
        folder=folder,
        resume=True,
        checkpoint_every=2,
        display=False,
    )


async def run(folder: Path, loop: str) -> None:
    call, plan = LOOPS[loop]
    async with AsyncServiceClient() as service:
        config = plan.as_config()
        with rl.open_run(
            folder, config, tasks=TASKS, steps=STEPS, resume=True, checkpoint_every=2, display=False
        ) as opened:
            opened.exact = loop != "in_flight"
            trainer = await opened.open_trainer(service, "weaver-nano", {"rank": 8})
            await call(trainer, plan=plan, run=opened)
        await trainer.save_weights_for_sampler("final", overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
