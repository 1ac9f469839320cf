"""Environments of others: those of `verifiers`, and servers of OpenEnv, as environments of ours.

Both packages are installed beside this one, by their own names; nothing of them is imported before
it is used. They run on asyncio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

from weaver.errors import ConfigError, MissingDependencyError, ServiceConnectionError
from weaver_rl.agent import Agent
from weaver_rl.endpoint import endpoint
from weaver_rl.rollouts import Environment
from weaver_rl.types import Score, Task

__all__ = ["from_openenv", "from_verifiers"]

NO_KEY = "WEAVER_ENDPOINT_KEY"
"""The variable in which verifiers looks for a key of an endpoint that needs none."""


class EpisodeFailedError(Exception):
    """An episode of `verifiers` failed, with its own words."""


@asynccontextmanager
async def from_verifiers(
    env: Any, *, most: int | None = None
) -> AsyncIterator[tuple[list[Task], Environment]]:
    """An `Env` of `verifiers.v1` with one agent: its tasks, and how they are played.

    `async with rl.from_verifiers(env) as (tasks, play): await rl.off_policy(trainer, tasks, ...)`;
    what it serves lives until the block ends. Its harness talks to an `rl.endpoint`; the reward is
    the trace's, its metrics are logged. An episode that is not `ok` is a failed rollout.

    Args:
        most: tasks, from the first; None: all.

    Raises:
        ConfigError: its tasks never end, and `most` is not given.
        MissingDependencyError: `verifiers` 0.4 or later is not installed.
    """
    try:
        from verifiers.v1 import EvalClientConfig, ModelContext
    except ImportError as error:
        what = "an environment of verifiers needs verifiers.v1."
        raise MissingDependencyError(what, hint='Run: pip install "verifiers>=0.4"') from error
    if most is None and not env.taskset.bounded:
        raise ConfigError("is needed: these tasks never end.", field="most", hint="Give a number.")
    theirs = list(islice(env.taskset, most))
    tasks: list[Task] = [
        {"index": i, "prompt": task.data.prompt_text} for i, task in enumerate(theirs)
    ]

    async def play(agent: Agent, task: Task) -> Score:
        async with endpoint(agent) as url:
            client = EvalClientConfig(base_url=url, api_key_var=NO_KEY)
            context = ModelContext(model=agent.base_model, client=client)
            episode = await env.run_episode(theirs[task["index"]], context)
            if not episode.ok or len(episode.traces) != 1:
                errors = [*episode.errors, *(e for trace in episode.traces for e in trace.errors)]
                said = [f"{error.type}: {error.message}" for error in errors]
                seats = f"{len(episode.traces)} agents played; one can be trained"
                raise EpisodeFailedError("; ".join(said) or seats)
        (trace,) = episode.traces
        metrics = {k: float(v) for k, v in trace.metrics.items() if v is not None}
        rewards = {k: float(v.score) for k, v in trace.rewards.items() if v is not None}
        return Score(float(trace.reward), {**metrics, **rewards})

    async with env.serving():
        yield tasks, play


def from_openenv(
    url: str,
    *,
    say: Callable[[Mapping[str, Any]], str],
    act: Callable[[str], Mapping[str, Any]],
    timeout_s: float = 60.0,
) -> Environment:
    """Plays a server of OpenEnv, `http://127.0.0.1:8000`: each rollout is a session of its own.

    A task's `reset`, such as `{"seed": 3}`, is what the session is reset with. Rewards of steps are
    those of turns, and the result is their sum; it goes on until the server says that it is done,
    or a budget is used.

    Args:
        say: what the model is told of an observation.
        act: the action that a reply asks for.
        timeout_s: of each answer.

    Raises:
        MissingDependencyError: `openenv-core` is not installed.
        ServiceConnectionError, in a rollout: there is no such server.
    """
    try:
        from openenv.core import GenericEnvClient
    except ImportError as error:
        what = "a server of OpenEnv needs openenv-core."
        raise MissingDependencyError(what, hint="Run: pip install openenv-core") from error

    async def play(agent: Agent, task: Task) -> Score:
        session = GenericEnvClient(base_url=url, message_timeout_s=timeout_s)
        try:
            await session.connect()
        except ConnectionError as error:
            hint = "Start it, or name another address."
            raise ServiceConnectionError(f"{error}.", field="url", hint=hint) from error
        try:
            result = await session.reset(**dict(task.get("reset") or {}))
            total = 0.0
            while not result.done:
                reply = await agent.chat(say(result.observation))
                result = await session.step(dict(act(reply.text)))
                earned = float(result.reward or 0.0)
                agent.reward(earned)
                total += earned
        finally:
            await session.close()
        return Score(total)

    return play
