"""Traces of a server, as a collector receives them."""

from __future__ import annotations

import http.server
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.fake_engine import FakeEngine
from tests.server.adapters.helpers import Rest
from tests.server.http.helpers import running, serving
from weaver import Datum, ServiceClient
from weaver.errors import WeaverError
from weaver.server.http.tracing import Tracing
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATUM = Datum(model_input=[5, 6, 7], loss_fn_inputs={"target_tokens": [6, 7, 8]})
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Its address, and what was sent to it."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", received
        server.shutdown()


def test_a_collector_gets_requests_and_operations(home: Path) -> None:
    provider = trace.get_tracer_provider()
    with collector() as (endpoint, received):
        settings = ServerSettings(home=home, port=0, auth=False, otel_endpoint=endpoint)
        with (
            serving(FakeEngine(), settings) as server,
            ServiceClient(base_url=server.address) as service,
        ):
            trainer = service.create_model("fake", {"rank": 2})
            trainer.forward_backward([DATUM], loss_fn="cross_entropy", wait=True)
            trainer.optim_step({"learning_rate": 0.1}, wait=True)
            with pytest.raises(WeaverError):
                trainer.optim_step({"learning_rate": 0.1}, wait=True)
    assert trace.get_tracer_provider() is provider
    [resource] = {str(r.resource) for request in received for r in request.resource_spans}
    assert 'string_value: "weaver"' in resource
    spans = {
        span.span_id: (span, {pair.key: pair.value for pair in span.attributes})
        for request in received
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    }
    operations = [(s, ids) for s, ids in spans.values() if "weaver.submission_id" in ids]
    kinds = sorted(span.name for span, _ in operations)
    assert kinds == ["create_model", "forward_backward", "optim_step", "optim_step"]
    for span, ids in operations:
        parent, _ = spans[span.parent_span_id]
        assert parent.name == "POST /v1/sessions/{session_id}/submissions"
        assert span.trace_id == parent.trace_id
        assert ids["weaver.session_id"].string_value.startswith("session-")
        if span.name != "create_model":
            assert ids["weaver.run_id"].string_value == trainer.model_id
    [failed] = [span for span, _ in operations if span.status.code == 2]
    assert failed.status.message == "no_gradients"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_request_goes_on_with_its_callers_trace(home: Path) -> None:
    spans = InMemorySpanExporter()
    async with running(home) as server, server.http() as http:
        tracing = server.gateway.tracing = Tracing(SimpleSpanProcessor(spans))
        server.service.parts.activity.on_end = tracing.operation
        api = Rest(http)
        model_id = await api.model()
        spans.clear()
        await api.backward(model_id, traceparent=PARENT, **{"X-Request-ID": "mine"})
        operation, request = spans.get_finished_spans()
    assert request.name == "POST /api/v1/models/{model_id}/forward-backward-passes"
    assert request.parent is not None and f"{request.parent.span_id:016x}" in PARENT
    assert operation.parent is not None
    assert operation.parent.span_id == request.context.span_id
    assert request.attributes is not None
    assert request.attributes["weaver.request_id"] == "mine"
    assert request.attributes["http.response.status_code"] == 200
