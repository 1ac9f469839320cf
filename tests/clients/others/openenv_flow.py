"""Plays and trains on a server of OpenEnv, a game of several steps; prints what it was."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import anyio
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver.errors import ServiceConnectionError
from weaver.types import SamplingParams
from weaver_rl.rollouts import sample_groups

SAMPLING = SamplingParams(max_tokens=4)


class Guess(Action):
    number: int


class Said(Observation):
    text: str = ""


class Game(Environment[Guess, Said, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Said:
        self.answer, self.left = Random(seed).randint(1, 7), 3
        return Said(text="Guess a number from 1 to 7.", reward=0.0, done=False)

    def step(self, action: Guess, timeout_s: float | None = None, **more: Any) -> Said:
        self.left -= 1
        right = action.number == self.answer
        text = "higher" if action.number < self.answer else "lower"
        return Said(text=text, reward=float(right), done=right or not self.left)

    @property
    def state(self) -> State:
        return State()


def serve() -> str:
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_fastapi_app(Game, Guess, Said, max_concurrent_envs=16)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    work = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    work.start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def act(text: str) -> dict[str, Any]:
    return {"number": int(text) if text.strip().isdecimal() else 0}


async def main() -> dict[str, Any]:
    play = rl.from_openenv(serve(), say=lambda seen: str(seen["text"]), act=act)
    tasks: list[rl.Task] = [{"reset": {"seed": seed}} for seed in (1, 2, 1)]
    async with AsyncServiceClient(home=Path(tempfile.mkdtemp())) as service:
        sampler = await service.create_sampling_client(base_model="weaver-nano")
        groups = await sample_groups(
            sampler, tasks, rl.each(play), group_size=2, sampling=SAMPLING, seed=5
        )
        trainer = await service.create_model("weaver-nano", {"rank": 8})
        plan = rl.Plan(steps=1, groups_per_step=2, group_size=2, sampling=SAMPLING)
        done = await rl.off_policy(trainer, tasks, rl.each(play), plan)
        gone = rl.from_openenv("http://127.0.0.1:9", say=str, act=act)
        try:
            await sample_groups(
                sampler, tasks, rl.each(gone), group_size=1, sampling=SAMPLING, seed=5
            )
        except ServiceConnectionError as error:
            refused = str(error)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "failures": [one.failure.traceback for one in rollouts if one.failure],
        "turns": [one.trajectory.turns for one in rollouts],
        "rewards": [one.reward for one in rollouts],
        "turn_rewards": [one.trajectory.turn_rewards for one in rollouts],
        "said": [message["content"] for message in rollouts[0].trajectory.messages],
        "trained": done.metrics["reward/mean"],
        "refused": refused,
    }


if __name__ == "__main__":
    print(json.dumps(anyio.run(main)))
