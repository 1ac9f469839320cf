"""A client of the Weaver REST interface for its tests: plain requests, over ASGI."""

from __future__ import annotations

import hashlib
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

from tests.server.http.helpers import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx

    from tests.fake_engine import FakeEngine

CHUNKS = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
TARGETS = {"data": [2, 3, 4], "dtype": "int64"}
DATUM = {"model_input": CHUNKS, "loss_fn_inputs": {"target_tokens": TARGETS}}
ADAM = {"learning_rate": 0.1}


@dataclass(frozen=True, slots=True)
class Rest:
    http: httpx.AsyncClient

    async def call(
        self, method: str, path: str, body: object = None, *, status: int = 200, **headers: str
    ) -> Any:
        """The answer's JSON, its status checked."""
        content = None if body is None else json.dumps(body)
        reply = await self.http.request(
            method,
            f"/api/v1{path}",
            content=content,
            headers={"Content-Type": "application/json", **headers},
        )
        assert reply.status_code == status, reply.text
        return reply.json() if reply.content else None

    async def session(self) -> str:
        return str((await self.call("POST", "/sessions", {"tags": []}, status=201))["id"])

    async def model(self, **settings: object) -> str:
        body = {"model_seq_id": 1, "base_model": "fake", **settings}
        path = f"/sessions/{await self.session()}/models"
        return str((await self.call("POST", path, body, status=201))["id"])

    async def backward(self, model_id: str, seq_id: int = 1, **headers: str) -> Any:
        body = passes("forward_backward", seq_id=seq_id)
        return await self.call(
            "POST", f"/models/{model_id}/forward-backward-passes", body, **headers
        )

    async def step(self, model_id: str, seq_id: int = 2, **headers: str) -> Any:
        body = {"payload": {"model_id": model_id, "seq_id": seq_id, "adam_params": ADAM}}
        return await self.call("POST", f"/models/{model_id}/optimizer-steps", body, **headers)

    async def result(self, operation: Any) -> Any:
        """The response of an operation that succeeds, polled for where it is not there yet."""
        while operation["status"] == "pending":
            operation = await self.call("GET", f"/operations/{operation['id']}")
        assert operation["status"] == "done", operation
        return operation["response"]

    async def sampler(self, model_id: str) -> str:
        reply = await self.call("POST", f"/models/{model_id}/export-sampler", {"seq_id": 9})
        return str((await self.result(reply))["sampling_session_id"])


@asynccontextmanager
async def rest(home: Path, engine: FakeEngine | None = None) -> AsyncIterator[Rest]:
    async with running(home, engine=engine) as server, server.http() as http:
        yield Rest(http)


def passes(
    verb: str,
    *,
    seq_id: int = 1,
    loss_fn: str = "cross_entropy",
    data: object = None,
    config: object = None,
) -> dict[str, Any]:
    given: dict[str, object] = {"loss_fn": loss_fn, "data": [DATUM] if data is None else data}
    if config is not None:
        given["loss_fn_config"] = config
    return {"payload": {"seq_id": seq_id, f"{verb}_input": given}}


def packed(
    packing: str = "raw", *, manifest: dict[str, Any] | None = None, **changes: object
) -> tuple[bytes, dict[str, str]]:
    """An http-binary `forward_backward` of one datum, and its headers.

    `changes` are made to the description of the pack, `manifest` to the manifest.
    """
    tokens, targets = np.array([1, 2, 3], "<i8"), np.array([2, 3, 4], "<i8")
    weights = np.array([0.0, 1.0, 1.0], "<f4")
    offset, references, parts = 0, [], []
    for array in (tokens, targets, weights):
        name = {"i": "int64", "f": "float32"}[array.dtype.kind]
        references.append(
            {
                "$tensor": {
                    "format": "raw-tensor",
                    "codec": "raw",
                    "dtype": name,
                    "shape": [3],
                    "offset": offset,
                    "size_bytes": array.nbytes,
                }
            }
        )
        parts.append(array.tobytes())
        offset += array.nbytes
    pack = b"".join(parts)
    wire = zstandard.ZstdCompressor().compress(pack) if packing == "zstd" else pack
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": references[0]}]},
        "loss_fn_inputs": {"target_tokens": references[1], "weights": references[2]},
    }
    content = {
        "version": 1,
        "request": passes("forward_backward", data=[datum]),
        "tensor_pack": {
            "size_bytes": len(wire),
            "sha256": hashlib.sha256(wire).hexdigest(),
            "codec": packing,
            "decoded_size_bytes": len(pack),
            **changes,
        },
        **(manifest or {}),
    }
    return multipart(json.dumps(content).encode(), wire)


def multipart(manifest: bytes, pack: bytes) -> tuple[bytes, dict[str, str]]:
    mark = b"--weaver-0123"
    body = b"\r\n".join(
        [
            mark,
            b'Content-Disposition: form-data; name="manifest"',
            b"Content-Type: application/json",
            b"",
            manifest,
            mark,
            b'Content-Disposition: form-data; name="tensor_pack"; filename="pack.bin"',
            b"Content-Type: application/octet-stream",
            b"",
            pack,
            mark + b"--",
            b"",
        ]
    )
    return body, {"Content-Type": "multipart/form-data; boundary=weaver-0123"}
