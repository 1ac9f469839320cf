"""OpenTelemetry traces of a server: a span for each request, and one for each operation below it.

Made by `run_server` if an endpoint is set; needs the extra `otel`. The provider is its own, never
the global one of an application in the same process. Spans have ids, never data.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from weaver.errors import ConfigError, MissingDependencyError

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise MissingDependencyError(
        f"traces need {error.name}.", hint='Run: pip install "weaver-post-training[otel]"'
    ) from error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from weaver.protocol import Outcome
    from weaver.server.sessions import Ticket


def to_collector(endpoint: str) -> SpanProcessor:
    """Sends spans by OTLP over HTTP; headers and certificates are in the standard variables.

    Raises:
        ConfigError: it is no address.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"is {endpoint!r}.", field="otel_endpoint", hint="Such as http://127.0.0.1:4318."
        )
    bare = endpoint.partition("://")[2].partition("/")[2] == ""
    address = f"{endpoint.rstrip('/')}/v1/traces" if bare else endpoint
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=address))


class Tracing:
    def __init__(self, processor: SpanProcessor) -> None:
        named = Resource({"service.name": "weaver"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("weaver.server")

    def request(
        self, headers: Mapping[str, str], *, method: str, request_id: str
    ) -> AbstractContextManager[Span]:
        """The span of a request, below its caller's if that sent a `traceparent`."""
        return self._tracer.start_as_current_span(
            method,
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "weaver.request_id": request_id},
            record_exception=False,  # its text may hold data
            set_status_on_exception=False,
        )

    def operation(self, ticket: Ticket, outcome: Outcome) -> None:
        """The span of an operation that has ended, from its submission on."""
        submission = ticket.submission
        ids: dict[str, str | float] = {
            "weaver.session_id": ticket.session.session_id,
            "weaver.submission_id": submission.id,
            "weaver.run_id": submission.run_id or "",
            "weaver.waited_s": ticket.waited_s,
        }
        start = int(ticket.submitted_at * 1e9)
        begin = partial(self._tracer.start_span, submission.kind, attributes=ids, start_time=start)
        span = ticket.context.run(begin)
        if outcome.error is not None:
            span.set_status(Status(StatusCode.ERROR, outcome.error.code))
        span.end()

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
