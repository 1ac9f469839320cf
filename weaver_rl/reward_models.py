"""`reward_model`: a trained reward model as a reward. Users call it, and `algorithms.preference`
trains what it loads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import anyio

from weaver import AsyncRewardClient, RewardClient, ServiceClient
from weaver.checks import CheckpointPath, as_path, check_length
from weaver.errors import ConfigError
from weaver.threads import in_daemon_thread
from weaver.types import Datum, ModelInfo, ModelInput
from weaver_rl.conversations import to_datum
from weaver_rl.reference import whole
from weaver_rl.rewards import Reward
from weaver_rl.types import Reply, Task

__all__ = ["reward_model"]

REMEMBERED = 2**16
"""Scores that a reward keeps, those asked last."""


def reward_model(
    model: CheckpointPath | AsyncRewardClient,
    *,
    base_model: str | None = None,
    base_url: str | None = None,
    concurrency: int = 64,
) -> Reward:
    """What a reward model says of a task's prompt with the reply, and an end token behind it.

    Both are written by the reward model's own tokenizer and chat template, as `preference` writes
    what it is trained on, so that the policy may be of another kind. The same text is asked about
    once; what several rollouts ask at the same time shares passes.

    Args:
        model: the path of saved weights, or a client of a service that is open already, in whose
            event loop the reward is then called. For a path a client is opened at once and closed
            with the program; embedded it has an engine of its own.
        base_model: below a folder with an adapter in PEFT's layout.
        base_url: of a server that has the path; WEAVER_BASE_URL, or this process.
        concurrency: at most so many scores are asked for at the same time.

    Raises:
        ConfigError: a concurrency below 1, or arguments that only a path has; at construction.
        UnsupportedError, CheckpointNotFoundError: no reward model; at construction.
        InvalidRequestError, ContextLengthError: at the call: the text cannot be read by it.
    """
    if concurrency < 1:
        raise ConfigError(f"is {concurrency}.", field="concurrency", hint="At least 1.")
    if isinstance(model, AsyncRewardClient):
        if base_model is not None or base_url is not None:
            hint = "The client has both; leave them out."
            raise ConfigError("is given beside a client.", field="base_model, base_url", hint=hint)
        return _Rewards(model, _asker(model), concurrency=concurrency)
    with ExitStack() as stack:
        service = ServiceClient(base_url)
        stack.callback(service.close)
        client = service.create_reward_client(as_path(model, field="model"), base_model)
        client.score([[0]])  # loads its base, which a rollout would wait for
        stack.pop_all()
    return _Rewards(client, partial(_ask, service, client), concurrency=concurrency)


def sequence_of(
    tokenizer: Any, example: Mapping[str, Any], model: ModelInfo, *, where: str, **limits: Any
) -> ModelInput:
    """All tokens of a prompt with its completion, which `to_datum` reads. Errors: see there."""
    context = model.context_length
    tokens = whole(to_datum(tokenizer, example, context_length=context, where=where, **limits))
    check_length(tokens.length, context, field=where)
    return tokens


def sides_of(chosen: ModelInput, rejected: ModelInput, margin: object = None) -> list[Datum]:
    """A pair as the engine takes it."""
    inputs = {} if margin is None else {"margin": [margin]}
    return [Datum(model_input=chosen, loss_fn_inputs=inputs), Datum(model_input=rejected)]


class _Rewards:
    """A reward, `async (task, reply) -> float`, that remembers what it was told."""

    def __init__(
        self,
        client: AsyncRewardClient | RewardClient,
        ask: Callable[[ModelInput], Awaitable[float]],
        *,
        concurrency: int,
    ) -> None:
        self.__name__ = f"reward_model({client.sampler_id})"
        self._client = client
        self._ask = ask
        self._limiter = anyio.CapacityLimiter(concurrency)
        self._known: dict[tuple[int, ...], float] = {}
        self._asked: dict[tuple[int, ...], anyio.Event] = {}

    async def __call__(self, task: Task, reply: Reply) -> float:
        prompt = task["prompt"]
        said: object = reply.text
        if not isinstance(prompt, str):
            said = [{"role": "assistant", "content": reply.text}]
        more = {name: task[name] for name in ("tools", "chat_template_kwargs") if name in task}
        tokenizer = self._client.get_tokenizer()
        text = sequence_of(
            await tokenizer if isinstance(tokenizer, Awaitable) else tokenizer,
            {"prompt": prompt, "completion": said, **more},
            self._client.model_info,
            where="the prompt with its reply",
        )
        return await self._score(text)

    async def _score(self, text: ModelInput) -> float:
        key = tuple(text.to_ints())
        while key not in self._known:
            if key in self._asked:
                await self._asked[key].wait()
                continue
            self._asked[key] = anyio.Event()
            try:
                async with self._limiter:
                    self._known[key] = await self._ask(text)
            finally:
                self._asked.pop(key).set()
        self._known[key] = found = self._known.pop(key)
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return found


def _asker(client: AsyncRewardClient) -> Callable[[ModelInput], Awaitable[float]]:
    async def ask(text: ModelInput) -> float:
        [found] = await client.score([text])
        return found

    return ask


async def _ask(_: ServiceClient, client: RewardClient, text: ModelInput) -> float:
    """In a thread: the client is a sync one, whose service must not be collected."""
    work: Callable[[], Sequence[float]] = partial(client.score, [text])
    [found] = await in_daemon_thread(work)
    return found
