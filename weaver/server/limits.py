"""`Limits`: what a request may bring and a project may hold; options of `weaver serve`.

Asked by `LocalService` and its operations, and of bodies by the HTTP front.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver.config import setting
from weaver.errors import QuotaExceededError, TooLargeError

if TYPE_CHECKING:
    from weaver.types import JsonDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None is without a limit."""

    body_bytes: int = setting(
        256 * 2**20, "Bytes of a request's body, decompressed.", name="max_body_bytes", least=2**16
    )
    """Those of JSON have smaller limits of their own beside it."""
    submissions: int = 1024
    """Of one request."""
    operation_tokens: int | None = setting(
        2**22,
        "Tokens of the datums of a gradient pass, or of a sample's prompt and what it may draw.",
        name="max_operation_tokens",
        least=1,
    )
    metadata_bytes: int | None = 2**16
    """Of a session's or run's `user_metadata` as JSON: lists of them hold it all."""
    pending_operations: int | None = setting(
        2**14,
        "Operations of a project whose outcome its client has not collected.",
        name="max_pending",
        least=256,
    )
    pending_bytes: int | None = setting(
        2**30,
        "About the bytes of these operations and of outcomes that are kept; and of the gradient "
        "passes of a project's runs that only the journal holds.",
        name="max_pending_bytes",
        least=2**26,
    )
    sessions: int | None = setting(
        1024, "Open sessions of a project.", name="max_sessions", least=1
    )
    """Those that wire formats without sessions share do not count."""
    metric_points: int | None = setting(
        10**6, "Logged numbers of a run.", name="max_metric_points", least=1
    )
    metric_names: int | None = 10_000
    """Of a run."""
    runs: int | None = setting(None, "Runs of a project.", name="max_runs", least=0)
    stored_bytes: int | None = setting(
        None,
        "Bytes of a project's checkpoints and of its samplers without a name.",
        name="max_stored_bytes",
        least=0,
    )
    """Merged exports have a bound of their own, for all projects together."""
    session_timeout_s: float = setting(
        math.inf,
        "Seconds after which the session of a silent client is closed.",
        name="session_timeout",
        least=120,
    )
    unnamed_samplers: int = 64
    """The newest of a session are kept."""

    def check_tokens(self, tokens: int) -> None:
        """Raises TooLargeError: those of an operation."""
        if self.operation_tokens is not None and tokens > self.operation_tokens:
            raise TooLargeError(
                f"the operation has {tokens} tokens, the limit is {self.operation_tokens}.",
                hint="Split it.",
            )

    def check_metadata(self, metadata: JsonDict) -> None:
        """Raises TooLargeError."""
        if self.metadata_bytes is None:
            return
        if (size := len(json.dumps(metadata))) > self.metadata_bytes:
            raise TooLargeError(
                f"has {size} bytes, the limit is {self.metadata_bytes}.",
                field="user_metadata",
                hint="Name things in it, and keep them elsewhere.",
            )

    def check_bytes(self, pending: int, *, new: int) -> None:
        """Raises QuotaExceededError: trying again later helps; TooLargeError: it does not."""
        limit = self.pending_bytes
        if limit is not None and new > limit:
            raise TooLargeError(
                f"the operations have {new} bytes, those of a project may have {limit}.",
                hint="Split them.",
            )
        if limit is not None and new and pending + new > limit:
            raise QuotaExceededError(
                f"{pending + new} bytes would be pending, the limit of a project is {limit}.",
                hint="Collect results before sending more.",
            )

    def check_journal(self, unsaved: int) -> None:
        """Raises QuotaExceededError: no more gradient passes before a step."""
        if self.pending_bytes is not None and unsaved > self.pending_bytes:
            raise QuotaExceededError(
                f"{unsaved} bytes of gradient passes would be in no snapshot of the project's "
                f"runs, the limit is {self.pending_bytes}.",
                hint="Take an optim_step, or delete runs.",
            )

    def check_pending(self, pending: int, *, new: int) -> None:
        """Raises QuotaExceededError: trying again later helps."""
        limit = self.pending_operations
        if limit is not None and new and pending + new > limit:
            raise QuotaExceededError(
                f"{pending + new} operations would be pending, the limit of a project is {limit}.",
                hint="Collect results before sending more.",
            )

    def check_sessions(self, sessions: int) -> None:
        """Raises QuotaExceededError: there is no room for another one."""
        if self.sessions is not None and sessions >= self.sessions:
            raise QuotaExceededError(
                f"the project has {sessions} open sessions, the limit is {self.sessions}.",
                hint="Close one; that of a silent client closes by itself.",
            )

    def check_metrics(self, *, names: int, points: int) -> None:
        """Raises TooLargeError: a run would have more metrics than there is room for."""
        for what, count, limit in (
            ("names of metrics", names, self.metric_names),
            ("logged numbers", points, self.metric_points),
        ):
            if limit is not None and count > limit:
                raise TooLargeError(
                    f"the run would have {count} {what}, the limit is {limit}.",
                    field="metrics",
                    hint="Log fewer of them, or go on in another run.",
                )

    def check_runs(self, runs: int) -> None:
        """Raises QuotaExceededError: there is no room for another one."""
        if self.runs is not None and runs >= self.runs:
            raise QuotaExceededError(
                f"the project has {runs} runs, the limit is {self.runs}.",
                hint="Delete one, or ask an administrator.",
            )

    def check_stored(self, stored_bytes: int) -> None:
        """Raises QuotaExceededError: there is no room for another checkpoint."""
        if self.stored_bytes is not None and stored_bytes >= self.stored_bytes:
            raise QuotaExceededError(
                f"the project's checkpoints have {stored_bytes} bytes, "
                f"the limit is {self.stored_bytes}.",
                hint="Delete some, or give them a time to live.",
            )


SERVED = Limits(session_timeout_s=600.0)
"""Of a server. A client rides out five minutes without it, and is heard of each minute."""
EMBEDDED = Limits(
    operation_tokens=None,
    metadata_bytes=None,
    pending_operations=None,
    pending_bytes=None,
    sessions=None,
    metric_points=None,
    metric_names=None,
)
"""Of the engine in a user's own process."""
