"""A client of Tinker's protocol for its tests: plain requests, over ASGI or a socket."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.server.http.helpers import running
from weaver.server.adapters.tinker import messages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    import httpx

    from tests.fake_engine import FakeEngine

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
ADAM = {"learning_rate": 0.1}


@dataclass(frozen=True, slots=True)
class Tinker:
    http: httpx.AsyncClient

    async def call(
        self, path: str, body: object = None, *, method: str = "POST", status: int = 200
    ) -> Any:
        """The answer's JSON, its status checked."""
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        reply = await self.http.request(method, f"/api/v1/{path}", content=content, headers=headers)
        assert reply.status_code == status, reply.text
        return reply.json() if reply.content else None

    async def get(self, path: str, *, status: int = 200) -> Any:
        return await self.call(path, method="GET", status=status)

    async def session(self) -> str:
        made = await self.call("create_session", {"tags": [], "user_metadata": {"who": "me"}})
        return str(made["session_id"])

    async def model(self, session_id: str | None = None, number: int = 0, **settings: Any) -> str:
        given = {"base_model": "fake", "lora_config": {"rank": 2}, **settings}
        session_id = session_id or await self.session()
        body = {"session_id": session_id, "model_seq_id": number, **given}
        future = await self.call("create_model", body)
        assert await self.result(future) == {
            "model_id": future["model_id"],
            "type": "create_model",
        }
        return str(future["model_id"])

    async def backward(self, model_id: str, seq_id: int, *, status: int = 200, **given: Any) -> Any:
        headers = {"Content-Type": messages.MEDIA_TYPE}
        reply = await self.http.post(
            "/api/v1/forward_backward", content=passing(model_id, seq_id, **given), headers=headers
        )
        assert reply.status_code == status, reply.text
        return reply.json()

    async def step(self, model_id: str, seq_id: int) -> Any:
        body = {"model_id": model_id, "seq_id": seq_id, "adam_params": ADAM}
        return await self.call("optim_step", body)

    async def sample(self, sampling_session: str, seq_id: int = 0, **given: Any) -> Any:
        body = {
            "sampling_session_id": sampling_session,
            "seq_id": seq_id,
            "prompt": PROMPT,
            "sampling_params": {"max_tokens": 4, "seed": 1},
            **given,
        }
        return await self.call("asample", body)

    async def result(self, future: Any, *, accept: str = "application/json") -> Any:
        """JSON, or the bytes of a message where that is accepted."""
        for _ in range(5):
            reply = await self.http.post(
                "/api/v1/retrieve_future",
                json={"request_id": future["request_id"]},
                headers={"Accept": accept},
                timeout=60,
            )
            if reply.status_code != 408:
                break
        assert reply.status_code == 200, reply.text
        binary = reply.headers["Content-Type"] == messages.MEDIA_TYPE
        return reply.content if binary else reply.json()

    async def binary(self, future: Any) -> bytes:
        content = await self.result(future, accept=messages.MEDIA_TYPE)
        assert isinstance(content, bytes), content
        return content


@asynccontextmanager
async def tinker(home: Path, engine: FakeEngine | None = None) -> AsyncIterator[Tinker]:
    async with running(home, engine=engine) as server, server.http() as http:
        yield Tinker(http)


def passing(
    model_id: str,
    seq_id: int,
    *,
    tokens: Sequence[int] = (1, 2, 3),
    inputs: Mapping[str, Sequence[float]] | None = None,
    loss_fn: str = "cross_entropy",
    datums: int = 1,
    forward_only: bool = False,
    **config: float,
) -> bytes:
    request = messages.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only
    )
    given: Mapping[str, Sequence[float]] = {"target_tokens": [2, 3, 4], **(inputs or {})}
    for _ in range(datums):
        datum = request.data.add()
        datum.model_input.add().text.tokens = np.asarray(tokens, "<i4").tobytes()
        for name, values in given.items():
            whole = name == "target_tokens"
            tensor = datum.loss_fn_inputs[name]
            tensor.dense = np.asarray(values, "<i8" if whole else "<f4").tobytes()
            tensor.dtype = messages.INT64 if whole else messages.FLOAT32
            tensor.shape.append(len(values))
    for name, value in config.items():
        request.loss_fn_config_v2[name].number = value
    return bytes(request.SerializeToString())
