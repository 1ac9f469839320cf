"""The service that a blocking call such as `rl.train` has opened, for what runs inside of it.

A judge names its model before there is a service. Tasks inherit the context in which they were
begun: so the service is found there, however deep a reward is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import anyio

from weaver import AsyncSamplingClient, AsyncServiceClient
from weaver.errors import ConfigError


@dataclass(slots=True)
class _Serving:
    service: AsyncServiceClient
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    samplers: dict[str, AsyncSamplingClient] = field(default_factory=dict)
    """By the name or path that they were asked for."""


SERVING: ContextVar[_Serving | None] = ContextVar("serving", default=None)


@contextmanager
def serving(service: AsyncServiceClient) -> Iterator[None]:
    """Rewards that are called inside find their models on this service."""
    token = SERVING.set(_Serving(service))
    try:
        yield
    finally:
        SERVING.reset(token)


async def sampler_of(model: str) -> AsyncSamplingClient:
    """A base model by its name, or weights by their `weaver://` path; opened once.

    Raises:
        ConfigError: no service was opened by a call around this one.
        UnknownModelError, CheckpointNotFoundError: it has no such model or weights.
    """
    here = SERVING.get()
    if here is None:
        raise ConfigError(
            f"{model!r} names a model, and no service is known here.",
            field="judge",
            hint="Names hold inside rl.train; in a loop of your own pass "
            "await service.create_sampling_client(base_model=...).",
        )
    async with here.lock:
        if model not in here.samplers:
            saved = model.startswith("weaver://")
            opened = here.service.create_sampling_client(
                model_path=model if saved else None, base_model=None if saved else model
            )
            here.samplers[model] = await opened
    return here.samplers[model]
