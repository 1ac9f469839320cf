"""`HttpService`: the `Service` protocol over HTTP; what `base_url` opens. The only user of httpx.

Every call may be sent again: submissions carry ids, outcomes a cursor, other changes an
Idempotency-Key. So a lost reply or a server that restarts is a pause, up to a deadline.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Self, TypeVar
from urllib.parse import quote, urlencode

import anyio
import httpx
from pydantic import TypeAdapter

from weaver import errors, exchange, protocol, types, wire
from weaver.client.address import parse_address
from weaver.client.outage import ComesBackError, Outage
from weaver.config import is_loopback

Params = Mapping[str, str | float]
logger = logging.getLogger(__name__)
T = TypeVar("T")

REPLY_S = 60.0
"""A reply has to go on within this time, beside what was asked to wait for."""
FIRST_CONTACT_S = 3.0
"""How long a server may be out of reach when a session is opened: it was never there."""
OUTAGE_S = 300.0
"""How long a server may be out of reach later: it restarts, or the network does."""
COMES_BACK = frozenset({429, 502, 503, 504})
"""Statuses that pass; 429 only where the server says when."""

SESSION, SESSIONS = TypeAdapter(protocol.SessionInfo), TypeAdapter(list[protocol.SessionState])
OUTCOMES = TypeAdapter(tuple[protocol.Outcome, ...])
MODEL, MODELS = TypeAdapter(types.ModelInfo), TypeAdapter(list[types.ModelInfo])
FILES, SERVER = TypeAdapter(dict[str, bytes]), TypeAdapter(exchange.ServerInfo)
RUN, RUNS = TypeAdapter(types.TrainingRun), TypeAdapter(list[types.TrainingRun])
CHECKPOINT, CHECKPOINTS = TypeAdapter(types.CheckpointInfo), TypeAdapter(list[types.CheckpointInfo])
METRICS, EXPORT = TypeAdapter(list[types.MetricPoint]), TypeAdapter(exchange.Export)


class HttpService:
    """A service at `base_url`.

    Args:
        transport: in place of the network, for tests.
        outage_s: how long calls wait for a server that does not answer.

    Raises:
        ConfigError: the key cannot be one.
        ServiceConnectionError: from any call, once the server was out of reach for too long; it
            names the address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        parts = parse_address(base_url)
        self._address = parts.geturl()
        self._outage_s = outage_s
        if api_key is not None and not re.fullmatch(r"[!-~]*", api_key):  # it is not shown
            raise errors.ConfigError(
                "has a space, a line end or another character that no key has.",
                field="api_key",
                hint="Copy it again, as `weaver keys create` printed it.",
            )
        try:
            self._http = httpx.AsyncClient(
                base_url=f"{self._address}/v1/",
                headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
                transport=transport,
                # The environment's authorities count on loopback too; 0.1 s, which HTTP saves.
                verify=parts.scheme == "https" and httpx.create_ssl_context(),
                trust_env=not is_loopback(parts.hostname or ""),  # a proxy has another loopback
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            )
            self._headers = dict(self._http.headers)
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            raise errors.ServiceConnectionError(
                f"{self._address} cannot be used: {error}",
                hint="Check it, and the proxy, SSL_CERT_FILE and SSL_CERT_DIR of the environment.",
            ) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # --- the service ----------------------------------------------------------------------------

    async def open_session(
        self, *, user_metadata: types.JsonDict | None = None
    ) -> protocol.SessionInfo:
        body = {"user_metadata": user_metadata or {}}
        outage_s = min(FIRST_CONTACT_S, self._outage_s)
        reply = await self._call("POST", "sessions", body=body, outage_s=outage_s)
        return self._read(reply, SESSION)

    async def close_session(self, session_id: str) -> None:
        try:
            await self._call("DELETE", "sessions", session_id, outage_s=FIRST_CONTACT_S)
        except errors.NotFoundError:
            logger.debug("session %s was closed before", session_id)

    async def list_sessions(self) -> Sequence[protocol.SessionState]:
        return self._read(await self._call("GET", "sessions"), SESSIONS)

    async def submit(self, session_id: str, submissions: Sequence[protocol.Submission]) -> None:
        data = await wire.beside(wire.about_bytes(submissions), partial(wire.encode, submissions))
        await self._call("POST", "sessions", session_id, "submissions", body=data)

    async def collect(
        self, session_id: str, *, after: int, timeout_s: float
    ) -> Sequence[protocol.Outcome]:
        end = anyio.current_time() + timeout_s
        while True:
            wait_s = min(max(end - anyio.current_time(), 0.0), protocol.LONGEST_POLL_S)
            params = {"after": after, "timeout": wait_s}
            reply = await self._call(
                "GET", "sessions", session_id, "outcomes", params=params, wait_s=wait_s
            )
            outcomes = await self._decode(reply, OUTCOMES)
            if outcomes or anyio.current_time() >= end:
                return outcomes

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        body = {"submission_ids": list(submission_ids)}
        await self._call("POST", "sessions", session_id, "cancel", body=body)

    async def stream(self, session_id: str, submission_id: str) -> AsyncIterator[types.SampleDelta]:
        path = _path("sessions", session_id, "stream", submission_id)
        outage = Outage(self._address, self._outage_s)
        seen = 0
        last: tuple[str, str] | None = None
        while True:
            try:
                async with aclosing(self._events(path, seen)) as events:
                    async for kind, data in events:
                        if kind != "message":
                            last = kind, data
                            continue  # to the end of the reply, so that its connection is kept
                        seen += 1
                        outage.over()
                        yield types.SampleDelta.model_validate_json(data)
                match last:
                    case ("end", _):
                        return
                    case ("error", info):
                        raise protocol.ErrorInfo.model_validate_json(info).to_error()
                raise httpx.ReadError("the stream ended in its middle")
            except (httpx.TransportError, ComesBackError) as error:
                await outage.pause(error)

    async def about(self) -> exchange.ServerInfo:
        """Raises NotFoundError: a server of before 0.2 does not tell."""
        return self._read(await self._call("GET", "server"), SERVER)

    async def list_models(self) -> Sequence[types.ModelInfo]:
        return self._read(await self._call("GET", "base-models"), MODELS)

    async def get_model(self, base_model: str) -> types.ModelInfo:
        reply = await self._call("GET", "base-models", "info", params={"name": base_model})
        return self._read(reply, MODEL)

    async def tokenizer(self, base_model: str) -> None:
        """The server has its own."""

    async def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        reply = await self._call("GET", "base-models", "tokenizer", params={"name": base_model})
        return await self._decode(reply, FILES)

    async def list_runs(self) -> Sequence[types.TrainingRun]:
        return self._read(await self._call("GET", "runs"), RUNS)

    async def get_run(self, run_id: str) -> types.TrainingRun:
        return self._read(await self._call("GET", "runs", run_id), RUN)

    async def rename_run(self, run_id: str, name: str) -> types.TrainingRun:
        return self._read(await self._call("PATCH", "runs", run_id, body={"name": name}), RUN)

    async def stop_run(self, run_id: str) -> types.TrainingRun:
        return self._read(await self._call("POST", "runs", run_id, "stop"), RUN)

    async def delete_run(self, run_id: str, *, checkpoints: bool = False) -> None:
        await self._call("DELETE", "runs", run_id, params={"checkpoints": checkpoints})

    async def list_checkpoints(self, run_id: str | None = None) -> Sequence[types.CheckpointInfo]:
        params = {} if run_id is None else {"run_id": run_id}
        return self._read(await self._call("GET", "checkpoints", params=params), CHECKPOINTS)

    async def get_checkpoint(self, path: str) -> types.CheckpointInfo:
        reply = await self._call("GET", "checkpoints", "info", params={"path": path})
        return self._read(reply, CHECKPOINT)

    async def delete_checkpoint(self, path: str) -> None:
        await self._call("DELETE", "checkpoints", params={"path": path})

    async def delete_checkpoints(
        self, which: exchange.Selection, *, dry_run: bool = False
    ) -> Sequence[types.CheckpointInfo]:
        body, params = which.model_dump(mode="json"), {"dry_run": dry_run}
        reply = await self._call("POST", "checkpoints", "delete", params=params, body=body)
        return self._read(reply, CHECKPOINTS)

    async def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> types.CheckpointInfo:
        body = {"ttl_seconds": ttl_seconds}
        reply = await self._call("PUT", "checkpoints", "ttl", params={"path": path}, body=body)
        return self._read(reply, CHECKPOINT)

    async def export_checkpoint(self, path: str, *, merge: bool = False) -> exchange.Export:
        params: Params = {"path": path, "merge": merge}
        return self._read(await self._call("GET", "checkpoints", "export", params=params), EXPORT)

    async def read_exported(
        self, path: str, name: str, *, merge: bool = False, offset: int = 0
    ) -> bytes:
        params: Params = {"path": path, "name": name, "merge": merge, "offset": offset}
        return (await self._call("GET", "checkpoints", "export", "file", params=params)).content

    async def put_import(self, import_id: str, name: str, data: bytes, *, offset: int) -> None:
        params: Params = {"name": name, "offset": offset}
        await self._call(
            "PUT", "imports", import_id, params=params, body=data, kind="application/octet-stream"
        )

    async def import_checkpoint(
        self, import_id: str, what: exchange.Import
    ) -> types.CheckpointInfo:
        body = what.model_dump(mode="json")
        return self._read(await self._call("POST", "imports", import_id, body=body), CHECKPOINT)

    async def drop_import(self, import_id: str) -> None:
        await self._call("DELETE", "imports", import_id, outage_s=FIRST_CONTACT_S)

    async def log_metrics(self, run_id: str, points: Sequence[types.MetricPoint]) -> None:
        body = {"points": [point.model_dump(mode="json") for point in points]}
        await self._call("POST", "runs", run_id, "metrics", body=body)

    async def rewind_metrics(self, run_id: str, step: int) -> None:
        await self._call("DELETE", "runs", run_id, "metrics", params={"after": step})

    async def read_metrics(
        self, run_id: str, *, name: str | None = None
    ) -> Sequence[types.MetricPoint]:
        points: list[types.MetricPoint] = []
        params, more = {} if name is None else {"name": name}, True
        while more:
            reply = await self._call("GET", "runs", run_id, "metrics", params=params)
            page = self._read(reply, METRICS)
            points += page
            more = protocol.NEXT_OFFSET in reply.headers
            params["offset"] = str(len(points))
        return points

    async def aclose(self) -> None:
        await self._http.aclose()

    # --- one request, as often as it takes ------------------------------------------------------

    async def _call(
        self,
        method: str,
        *path: str,
        params: Params | None = None,
        body: types.JsonDict | bytes | None = None,
        kind: str = protocol.MEDIA_TYPE,
        wait_s: float = 0.0,
        outage_s: float | None = None,
    ) -> httpx.Response:
        headers = self._headers
        if isinstance(body, bytes):  # which has its place: submissions have ids of their own
            headers = {**headers, "Content-Type": kind}
        elif method != "GET":
            headers = {**headers, "Content-Type": "application/json"}
            headers["Idempotency-Key"] = uuid.uuid4().hex
        timeout = httpx.Timeout(REPLY_S, connect=5.0, read=REPLY_S + wait_s, pool=None)
        request = partial(  # the client's own way to make one costs twice as much
            httpx.Request,
            method,
            httpx.URL(f"{self._address}/v1/{_path(*path)}?{urlencode(params or {})}".rstrip("?")),
            content=body if isinstance(body, bytes) or body is None else _json(body),
            headers=headers,
            extensions={"timeout": timeout.as_dict()},
        )
        outage = Outage(self._address, self._outage_s if outage_s is None else outage_s)
        while True:
            try:
                reply = await self._http.send(request())
                self._check(reply, again=outage.attempts > 0)
                return reply
            except (httpx.TransportError, ComesBackError) as error:
                await outage.pause(error)

    async def _events(self, path: str, seen: int) -> AsyncGenerator[tuple[str, str]]:
        """The (event, data) pairs of a stream of server-sent events."""
        headers = {"Last-Event-ID": str(seen)}
        kind, data, rest = "message", "", ""
        async with self._http.stream("GET", path, headers=headers, timeout=REPLY_S) as reply:
            if reply.status_code != 200:
                await reply.aread()
                self._check(reply)
            async for text in reply.aiter_text():
                *lines, rest = (rest + text).split("\n")  # httpx's lines end at U+2028, too
                for line in lines:
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        data = value
                    elif not line and data:  # an event counts once its end has come
                        yield kind, data
                        data = ""

    def _check(self, reply: httpx.Response, *, again: bool = False) -> None:
        """Raises the error that the reply holds, if any; what is deleted `again` may be gone."""
        gone = again and reply.status_code == 404 and reply.request.method == "DELETE"
        if reply.is_success or gone:
            return
        error = self._error(reply)
        after = reply.headers.get("Retry-After", "")
        if reply.status_code in COMES_BACK and (reply.status_code != 429 or after.isdecimal()):
            raise ComesBackError(error, float(after) if after.isdecimal() else 0.0)
        raise error

    def _error(self, reply: httpx.Response) -> errors.WeaverError:
        try:
            info = reply.json()["error"]
            known = {name: info.get(name) for name in protocol.ErrorInfo.model_fields}
            return protocol.ErrorInfo(**known).to_error()
        except (ValueError, TypeError, KeyError, AttributeError):
            return errors.ServiceConnectionError(
                f"{self._address} answered {reply.status_code} {reply.reason_phrase}.",
                hint="Is a Weaver server there?",
            )

    def _read(self, reply: httpx.Response, adapter: TypeAdapter[T]) -> T:
        try:
            return adapter.validate_json(reply.content)
        except ValueError:
            raise self._not_understood() from None

    async def _decode(self, reply: httpx.Response, adapter: TypeAdapter[T]) -> T:
        data = reply.content
        try:
            return await wire.beside(len(data), partial(wire.decode, data, adapter))
        except errors.InvalidRequestError:
            raise self._not_understood() from None

    def _not_understood(self) -> errors.ServiceConnectionError:
        return errors.ServiceConnectionError(
            f"{self._address} answered something that this client does not understand.",
            hint="Is a Weaver server of the same version there?",
        )


def _json(body: types.JsonDict) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequestError(
            f"cannot be sent: {error}.", field="user_metadata", hint="Use plain JSON values."
        ) from None


def _path(*segments: str) -> str:
    """A path of these segments, whatever they hold."""
    return "/".join(quote(segment, safe="") for segment in segments)
