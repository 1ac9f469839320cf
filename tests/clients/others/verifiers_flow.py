"""Plays and trains an environment of `verifiers`, whose harness is a program of theirs.

Prints what the rollouts were, and what the same agent does in Python with the same seeds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import anyio
import verifiers.v1 as vf

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.rollouts import sample_groups

SAMPLING = SamplingParams(max_tokens=4)


async def inside(agent: rl.Agent, task: rl.Task) -> float:
    reply = await agent.chat(task["prompt"])
    return float(reply.text.strip() == str(task["index"] + 1))


async def main() -> dict[str, Any]:
    seat = vf.AgentConfig(harness={"id": "null"}, runtime={"type": "subprocess"})
    config = vf.SingleAgentEnvConfig(taskset=vf.TasksetConfig(id="weaver_game"), agent=seat)
    home = Path(tempfile.mkdtemp())
    async with (
        AsyncServiceClient(home=home, deterministic=True) as service,
        rl.from_verifiers(vf.SingleAgentEnv(config), most=2) as (tasks, play),
    ):
        sampler = await service.create_sampling_client(base_model="weaver-nano")
        theirs, ours = [
            await sample_groups(
                sampler, tasks, rl.each(one), group_size=2, sampling=SAMPLING, seed=5
            )
            for one in (play, inside)
        ]
        trainer = await service.create_model("weaver-nano", {"rank": 8})
        plan = rl.Plan(steps=1, groups_per_step=2, group_size=2, sampling=SAMPLING)
        done = await rl.off_policy(trainer, tasks, rl.each(play), plan)
    rollouts, inner = ([one for group in side for one in group.rollouts] for side in (theirs, ours))
    return {
        "failures": [str(one.failure) for one in rollouts if one.failure],
        "same": [one.trajectory for one in rollouts] == [one.trajectory for one in inner],
        "rewards": [[one.reward for one in side] for side in (rollouts, inner)],
        "metrics": rollouts[0].metrics,
        "trained": done.metrics["reward/mean"],
    }


if __name__ == "__main__":
    print(json.dumps(anyio.run(main)))
