"""`Desk`: where requests for one agent arrive from the server's thread, in its own event loop."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token

from weaver.errors import (
    ClosedError,
    ConfigError,
    ConflictError,
    InvalidRequestError,
    WeaverError,
)
from weaver.server.adapters.openai.bodies import ChatBody
from weaver.threads import call_soon
from weaver_rl.agent import Agent, BudgetExceeded
from weaver_rl.endpoint.answers import answer
from weaver_rl.endpoint.lines import Line

THEIRS = (InvalidRequestError, ConfigError, ConflictError)
"""Errors of a request; any other is one of the service, and ends the rollout."""


class BudgetUsedError(InvalidRequestError):
    """How a client is told of `BudgetExceeded`."""

    code = "budget_exceeded"


@dataclass(eq=False)
class Asked:
    """A request on its way from the server's thread to the agent's loop, and its answer."""

    body: ChatBody
    loop: Any = field(default_factory=lambda: current_token().native_token)
    """The server's."""
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: str | WeaverError = ""
    gone: bool = False
    """Its client has left, or its agent has ended."""
    scope: anyio.CancelScope | None = None
    """Around the answering, in the agent's loop."""

    def told(self, answer: str | WeaverError) -> None:
        """In the server's loop; the first answer counts."""
        if not self.done.is_set():
            self.answer = answer
            self.done.set()


class Refusals:
    """Around the block of an endpoint: an error in it is told why the last request was refused."""

    last: BudgetExceeded | WeaverError | None = None

    def __enter__(self) -> Refusals:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or self.last is None or error is self.last:
            return
        if isinstance(self.last, BudgetExceeded):
            raise self.last from error
        error.add_note(f"The endpoint refused its last request: {self.last}")


class Desk:
    """Answers requests for an agent one at a time. Made and worked in the agent's loop."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.refusals = Refusals()
        self._loop = current_token().native_token
        self._lines: list[Line] = []
        self._inbox: deque[Asked] = deque()
        self._arrived = anyio.Event()
        self._now: Asked | None = None
        """What is being answered."""

    def ask(self, asked: Asked) -> None:
        """From the server's thread."""
        call_soon(self._loop, partial(self._take, asked))

    def leave(self, asked: Asked) -> None:
        """From the server's thread: nobody waits for it any more."""
        call_soon(self._loop, partial(self._drop, asked))

    async def work(self, tasks: TaskGroup) -> None:
        """Answers until it is cancelled."""
        while True:
            while self._inbox:
                tasks.start_soon(self._answer, self._inbox.popleft())
            self._arrived = anyio.Event()
            await self._arrived.wait()

    def _take(self, asked: Asked) -> None:
        self._inbox.append(asked)
        self._arrived.set()

    def _drop(self, asked: Asked) -> None:
        asked.gone = True
        if self._now is asked:
            self._now = None
        if asked.scope is not None:
            asked.scope.cancel()

    async def _answer(self, asked: Asked) -> None:
        if asked.gone:
            return
        try:
            with anyio.CancelScope() as asked.scope:
                self._tell(asked, await self._answered(asked))
                self.refusals.last = None
        except BudgetExceeded as error:
            self.refusals.last = error
            hint = "Let the agent end here, or give it a larger rl.Budget."
            self._tell(asked, BudgetUsedError(f"{error}.", hint=hint))
        except WeaverError as error:
            self.refusals.last = error
            self._tell(asked, error)
            if not isinstance(error, THEIRS):
                raise
        finally:
            if self._now is asked:
                self._now = None

    async def _answered(self, asked: Asked) -> str:
        if self._now is not None:
            raise ConflictError(
                "this agent is asked already: which turn comes first would be left to chance.",
                hint="Wait for the answer, or give each of those who ask an agent of its own.",
            )
        self._now = asked
        return await answer(self.agent, self._lines, asked.body, lambda: asked.gone)

    def _tell(self, asked: Asked, said: str | WeaverError) -> None:
        call_soon(asked.loop, partial(asked.told, said))


def ended() -> ClosedError:
    return ClosedError(
        "the rollout of this agent has ended.", hint="Ask within `async with rl.endpoint(agent)`."
    )
