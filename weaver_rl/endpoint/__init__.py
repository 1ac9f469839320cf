"""`endpoint`: an agent behind an address of OpenAI's protocol, for programs that know nothing else.

    async def play(agent, task):
        async with rl.endpoint(agent) as url:                 # OPENAI_BASE_URL of any harness
            done = await anyio.run_process([...], env={**os.environ, "OPENAI_BASE_URL": url, ...})
        return score(done.stdout)

What the program asks and is answered is recorded as if the environment had asked it in Python:
the same tokens with the same seeds, with their log-probabilities, and never encoded again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from weaver.errors import requiring
from weaver_rl.agent import Agent
from weaver_rl.guard import task_group

__all__ = ["endpoint"]


@asynccontextmanager
async def endpoint(agent: Agent) -> AsyncIterator[str]:
    """Opens an address, `http://127.0.0.1:41234/<secret>/v1`, whose replies are this agent's turns.

    It is on loopback, and whoever knows it can use it: the secret is the key, and the API key of a
    client counts for nothing. One server in a thread of its own has the addresses of all agents of
    this process; each ends with its `async with`, and who asks later is refused with `closed`.

    A history that goes on from one that was answered here goes on behind its very tokens; any other
    begins a segment of its own, in the same rollout. The distribution (temperature, top_p ...) is
    the run's; the client's `max_tokens`, `stop`, `n`, `tools`, forms and `logprobs` count, and its
    `seed` is mixed into that of the turn. One request at a time: a second one meanwhile is refused.

    Raises:
        BudgetExceeded: the block failed after a request that was refused since nothing was left.
        MissingDependencyError: the extra `server` is not installed.
        WeaverError: the service failed at a request; the block is cancelled.
    """
    with requiring("an endpoint", "server"):
        from weaver_rl.endpoint.desk import Desk
        from weaver_rl.endpoint.front import front
    desk = Desk(agent)
    with desk.refusals:
        async with task_group() as tasks:
            tasks.start_soon(desk.work, tasks)
            with front().opened(desk) as url:
                yield url
            tasks.cancel_scope.cancel()
