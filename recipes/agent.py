"""An agent that owns its loop, trained as it is: a program that knows OpenAI's protocol alone.

    python -m recipes.agent                                    # offline, about a minute
    python -m recipes.agent --dry-run                          # let it play four games, and leave
    python -m recipes.agent --upper 15 --steps 40

The program is `guesser.py`: it guesses a number by "higher" and "lower", and asks whatever
OPENAI_BASE_URL names for its guesses. Each rollout:

1. `rl.endpoint(agent)` opens an address for this rollout; the program is started with it, as a
   process of its own. What it asks and is answered is recorded, token by token.
2. When it has ended, each of its guesses is rated by how well it splits what is left, from −1 to 0:
   the rewards of its turns, from which is learned. The rollout's own reward is what they are for,
   and is what is shown: 1 where the number was found in as few guesses as halving needs, or 0.

Each step is that of `recipes.importance_sampling`, with the credit of turns: a guess answers for
itself, compared with those of the same turn in the rollouts of its group.

Every number is played in training and when it is evaluated, greedily: what is learned is how to
find it. Left out: games at once in one process, which a program that is slow to start would need.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import tyro

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.tasks.guess_number import guess_number_tasks, rate_guesses, score_guesses

from . import _run

PROGRAM = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guesser.py"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    upper: int = 7
    """Numbers are from 1 to this one."""
    held_out: int = 0
    """Of `--tasks`, which have `upper` and `answer`; without, all numbers are evaluated."""
    steps: int = 16
    max_tokens: int = 4
    learning_rate: float | None = 4e-3
    groups_per_step: int = 7
    group_size: int = 8


async def play(agent: rl.Agent, task: rl.Task) -> rl.Score:
    async with rl.endpoint(agent) as url:
        env = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"}
        done = await anyio.run_process([*PROGRAM, str(task["upper"]), str(task["answer"])], env=env)
    guesses = json.loads(done.stdout)
    for turn, reward in enumerate(rate_guesses(guesses, task)):
        agent.reward(reward, turn=turn)
    score = score_guesses(guesses, task)
    return rl.Score(score.metrics["won"], {"rated": score.reward})


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    own = guess_number_tasks(flags.upper, upper=flags.upper)
    tasks, held_out = _run.split_tasks(flags, own, asked=("upper", "answer"))
    played = rl.each(play, budget=rl.Budget(seconds=120))
    asked = partial(rl.evaluate, environment=played, sampling=flags.sampling)
    credit = rl.credit.turns(discount=0.0)
    plan = _run.plan_of(rl.Plan, flags, credit=credit, evaluate_every=8)
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            sampler = await service.create_sampling_client(base_model=flags.model)
            found = await asked(sampler, tasks[:4])
            for rollout in (group.rollouts[0] for group in found.groups):
                print(f"{rollout.reward:5.2f}  {rollout.task['answer']} ← {rollout.text!r}")
            return found.metrics
        planned = {"program": PROGRAM[-1], **plan.as_config()}
        with _run.opened(service, flags, "agent", tasks=tasks, plan=planned) as run:
            result = await rl.off_policy(
                await _run.trainer(service, flags, run),
                tasks,
                played,
                plan,
                run=run,
                evaluate=rl.evaluator(held_out or own, environment=played, sampling=flags.sampling),
            )
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
