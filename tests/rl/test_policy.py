"""What all loops do between steps: evaluations are logged with the weights that they are of."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.rl.fake import fake_service, vowels
from tests.rl.test_loops import PLAN, RATIO, TASKS
from weaver_rl.algorithms.policy import off_policy, on_policy
from weaver_rl.algorithms.rejection import Keep, rejection
from weaver_rl.algorithms.run import Run
from weaver_rl.algorithms.supervised import SupervisedPlan, supervised
from weaver_rl.loggers import JsonlLogger, Loggers
from weaver_rl.report import report_data
from weaver_rl.rollouts import single_turn
from weaver_rl.run_folder import open_run_folder
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from pathlib import Path

    from weaver import AsyncSamplingClient

RL_PLAN = replace(PLAN, evaluate_every=4)
EXAMPLES = [{"prompt": f"{i}=", "completion": "abc"} for i in range(6)]
SUPERVISED = SupervisedPlan(epochs=6, batch_tokens=99, learning_rate=0.1, evaluate_every=4)
STALE = replace(RL_PLAN, max_staleness=2, objective=RATIO)
LOOPS: dict[str, Any] = {
    "on_policy": partial(on_policy, tasks=TASKS, plan=RL_PLAN),
    "off_policy": partial(off_policy, tasks=TASKS, plan=STALE),
    "rejection": partial(rejection, tasks=TASKS, plan=RL_PLAN, keep=Keep(top_k=1)),
    "supervised": partial(supervised, examples=EXAMPLES, plan=SUPERVISED),
}


async def version(sampler: AsyncSamplingClient) -> dict[str, float]:
    """The optimizer step of the weights."""
    result = await sampler.sample("a", {"max_tokens": 1})
    return {"eval/mean": float(result.sequences[0].weights_version)}


@pytest.mark.anyio
@pytest.mark.parametrize("loop", LOOPS)
async def test_every_evaluation_is_logged_once(loop: str, tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "run", {})
    given = {} if loop == "supervised" else {"environment": single_turn(vowels)}

    async def run() -> tuple[float, list[dict[str, Any]], dict[int | None, float]]:
        async with fake_service(tmp_path / "home") as service:
            trainer = await service.create_model(base_model="fake")
            loggers = Loggers(JsonlLogger(folder.metrics))
            one = Run(folder=folder, loggers=loggers, checkpoint_every=3)
            result = await LOOPS[loop](trainer, run=one, evaluate=version, **given)
            kept = {p.step: p.value for p in await trainer.read_metrics("eval/mean")}
        return result.metrics["eval/mean"], read_lines(folder.metrics), kept

    last, rows, kept = await run()
    assert last == 6
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    evaluated = {row["step"]: row["eval/mean"] for row in rows if "eval/mean" in row}
    assert evaluated == kept == {0: 0, 4: 4, 6: 6}
    assert report_data(folder)["metrics"]["eval/mean"][-1] == 6
    # Where no step is left it answers the same, and logs nothing twice.
    assert await run() == (last, rows, {})
