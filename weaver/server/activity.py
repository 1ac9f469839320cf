"""`Activity`: which operations wait, run and have lately ended, without anybody's data.

`Outcomes` writes it, the console's routes and `/metrics` read it, all on the event loop. It is of
this process and begins anew after a restart, but for the answers, which the journal keeps.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from weaver import protocol
from weaver.server.checkpoints import SCHEME
from weaver.server.records import Answer
from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weaver.server.registry import Registry
    from weaver.server.sessions import Ticket

KEPT_OPERATIONS = 30
"""So many of a run's operations that have ended are kept."""
KEPT_RUNS = 256
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class OperationInfo(Value):
    """What is told of an operation: never its data, nor its result's."""

    kind: str
    """As in the protocol; `forward` for a pass without a gradient."""
    state: State
    session_id: str
    seq: int | None
    submitted_at: datetime
    waited_s: float
    ran_s: float
    step: int | None = None
    """Optimizer steps that its run had taken when it ended."""
    metrics: Mapping[str, float] = Field(default_factory=dict)
    error: protocol.ErrorInfo | None = None


@dataclass(slots=True, eq=False)
class Activity:
    """What the sessions and runs of one service do."""

    registry: Registry
    ended: int = 0
    """Operations."""
    failed: int = 0
    """Those of them that have an error, but for what was cancelled."""
    trained_tokens: int = 0
    """Tokens that went through `forward_backward` and `forward`."""
    sampled_tokens: int = 0
    freed_bytes: int = 0
    """Of checkpoints, exports, imports and drafts that sweeps have deleted."""
    on_end: Callable[[Ticket, protocol.Outcome], None] | None = None
    _ended: OrderedDict[str, deque[OperationInfo]] = field(default_factory=OrderedDict)

    def pending(self) -> Iterator[Ticket]:
        """What has no outcome yet, in the order of submission within a session."""
        for session in self.registry.sessions.values():
            yield from session.tickets.values()

    @property
    def held_bytes(self) -> int:
        """About, of what waits, runs or was not collected."""
        return sum(session.held_bytes for session in self.registry.sessions.values())

    @property
    def unsaved_bytes(self) -> int:
        """About, of gradient passes that no snapshot holds, so that the journal does."""
        return sum(run.unsaved_bytes for run in self.registry.runs.values())

    def pending_of(self, run_id: str) -> list[OperationInfo]:
        """A run's, and the samples of its weights; what runs comes first."""
        mine = [_told(ticket) for ticket in self.pending() if run_of(ticket) == run_id]
        return sorted(mine, key=lambda one: (one.state != "running", one.submitted_at))

    def ended_of(self, run_id: str) -> Sequence[OperationInfo]:
        """A run's last operations, the oldest first."""
        return self._ended.get(run_id, ())

    def note(self, ticket: Ticket, outcome: protocol.Outcome, *, step: int | None) -> None:
        """Takes down that an operation has ended; `step` is where its run then stands."""
        if self.on_end is not None:
            self.on_end(ticket, outcome)
        run_id, told = run_of(ticket), _told(ticket, outcome, step=step)
        self.ended += 1
        self.failed += told.state == "failed"
        match outcome.result:
            case protocol.GradientsDone():
                self.trained_tokens += int(told.metrics.get("num_tokens", 0))
            case protocol.Sampled():
                self.sampled_tokens += int(told.metrics["tokens"])
            case protocol.ModelCreated(run=run):
                run_id, told = run.run_id, told.model_copy(update={"step": 0})
        if run_id is None:
            return
        self._ended.setdefault(run_id, deque(maxlen=KEPT_OPERATIONS)).append(told)
        self._ended.move_to_end(run_id)
        if len(self._ended) > KEPT_RUNS:
            self._ended.popitem(last=False)


def _told(
    ticket: Ticket, outcome: protocol.Outcome | None = None, *, step: int | None = None
) -> OperationInfo:
    now, error = time.monotonic(), None if outcome is None else outcome.error
    state: State = "waiting" if ticket.began_at is None else "running"
    if error is not None:
        state = "cancelled" if error.code == "cancelled" else "failed"
    elif outcome is not None:
        state = "done"
    return OperationInfo(
        kind=_kind(ticket.submission),
        state=state,
        session_id=ticket.session.session_id,
        seq=ticket.submission.seq,
        submitted_at=datetime.fromtimestamp(ticket.submitted_at, UTC),
        waited_s=ticket.waited_s,
        ran_s=now - (ticket.began_at or now),
        step=step,
        metrics=numbers(outcome),
        error=error,
    )


def run_of(ticket: Ticket) -> str | None:
    """The run of an operation, or of the weights that it samples from."""
    path: str | None = None
    match ticket.submission.operation:
        case protocol.Sample(sampler_id=sampler_id):
            path = sampler_id
        case protocol.OpenSampler(model_path=model_path):
            path = model_path
    if path is not None and path.startswith(SCHEME):
        return path.removeprefix(SCHEME).partition("/")[0]
    return ticket.submission.run_id


def numbers(outcome: protocol.Outcome | None) -> Mapping[str, float]:
    match outcome and outcome.result:
        case protocol.GradientsDone(output=output) | protocol.StepDone(output=output):
            return {name: n for name, n in output.metrics.items() if math.isfinite(n)}
        case protocol.Sampled(output=output):
            return {"tokens": sum(len(sequence.tokens) for sequence in output.sequences)}
    return {}


def answer_of(ticket: Ticket, outcome: protocol.Outcome, *, step: int | None) -> Answer | None:
    """What is kept for the curves of a run."""
    run_id, metrics = ticket.submission.run_id, numbers(outcome)
    if run_id is None or step is None or not metrics:
        return None
    kind = _kind(ticket.submission)
    return Answer(run_id=run_id, kind=kind, step=step, metrics=metrics)


def _kind(submission: protocol.Submission) -> str:
    operation = submission.operation
    only_forward = isinstance(operation, protocol.ForwardBackward) and not operation.backward
    return "forward" if only_forward else submission.kind
