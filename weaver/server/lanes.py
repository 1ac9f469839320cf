"""Which operation is next: `Lane` holds those of one run in their order, `plan` and `Turns` choose.

Called by the service and the executor; nothing here waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.server.sessions import Ticket


@dataclass(slots=True)
class Inbox:
    """What one session has sent to a run: `waiting` came before its turn."""

    next_seq: int = 1
    waiting: dict[int, Ticket] = field(default_factory=dict)
    passed: list[tuple[int, int]] = field(default_factory=list)
    """The first and last seqs of what had its outcome before a restart, and is passed over."""
    watched: bool = False
    """A timer runs for the missing operation."""

    def skip(self) -> None:
        """Goes on behind what is passed over."""
        for first, last in sorted(self.passed):
            if first <= self.next_seq:
                self.next_seq = max(self.next_seq, last + 1)
                self.passed.remove((first, last))


class Lane:
    """Yields operations strictly by seq within a session, and by arrival between sessions.

    A refused, cancelled or withdrawn operation takes its place and is passed over there. An
    operation that belongs to no run has a lane of its own.
    """

    def __init__(self, *tickets: Ticket) -> None:
        self.discard_reason: str | None = None
        """Why the accumulated gradient must not be applied; set by `discard`."""
        self._inboxes: dict[str, Inbox] = {}
        self._ready = deque(tickets)

    def add(self, ticket: Ticket) -> bool:
        """Takes an operation in; False if its place was given up before it came."""
        seq = ticket.submission.seq
        assert seq is not None
        inbox = self.inbox(ticket.session.session_id)
        if seq < inbox.next_seq:
            return False
        inbox.waiting[seq] = ticket
        while inbox.next_seq in inbox.waiting:
            self._ready.append(inbox.waiting.pop(inbox.next_seq))
            inbox.next_seq += 1
            inbox.skip()
        return True

    def inbox(self, session_id: str) -> Inbox:
        return self._inboxes.setdefault(session_id, Inbox())

    def give_up(self, session_id: str) -> list[Ticket]:
        """Lets go of what waits behind a missing operation; answers what has to be failed."""
        inbox = self.inbox(session_id)
        stuck = [ticket for _, ticket in sorted(inbox.waiting.items())]
        for ticket in stuck:
            ticket.behind_gap = True
        if stuck:
            inbox.next_seq = max(inbox.waiting) + 1
            inbox.waiting.clear()
            inbox.skip()
        self._ready.extend(stuck)
        return [ticket for ticket in stuck if not ticket.settled]

    def tickets(self) -> list[Ticket]:
        """All that have not ended, whether or not it is their turn."""
        waiting = [ticket for inbox in self._inboxes.values() for ticket in inbox.waiting.values()]
        return [ticket for ticket in (*self._ready, *waiting) if not ticket.settled]

    def forget(self, session_id: str) -> None:
        self._inboxes.pop(session_id, None)

    def head(self) -> Ticket | None:
        """The operation whose turn it is. Passes over those that have their outcome already."""
        while self._ready and self._ready[0].settled:
            ticket = self._ready.popleft()
            if ticket.discards_gradient:
                self.discard(f"seq {ticket.submission.seq}: {ticket.error}")
        return self._ready[0] if self._ready else None

    def discard(self, reason: str | None) -> None:
        """Half a batch is never applied: a step that follows fails, unless the gradient is gone."""
        self.discard_reason = reason or self.discard_reason

    def cleared(self) -> None:
        """No gradient is left of a batch that lacks a part."""
        self.discard_reason = None

    @property
    def busy(self) -> bool:
        """Whether anything here still waits for its turn or its end."""
        return bool(self.tickets())


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The operation at the head of a lane."""

    merge_key: str | None
    """Heads with the same key can share a call of the engine; None runs alone."""
    num_tokens: int = 0
    """Of a gradient pass; optimizer steps have none."""


def plan(heads: Sequence[Head], budget_tokens: int) -> list[int]:
    """The heads, by index, to run in one engine call.

    `heads` are in the order in which their projects and lanes are next, so the first one always
    runs; later ones that can share its pass join while the sum of tokens stays within the budget.
    """
    if not heads:
        return []
    chosen, total = [0], heads[0].num_tokens
    for i, head in enumerate(heads[1:], start=1):
        together = head.merge_key is not None and head.merge_key == heads[0].merge_key
        if together and total + head.num_tokens <= budget_tokens:
            chosen.append(i)
            total += head.num_tokens
    return chosen


class Turns:
    """Gives the projects that wait for a lane of the engine the same time of it.

    Start-time fair queueing (Goyal, Vin and Cheng, doi:10.1145/248156.248171) of projects with
    equal weights: each has a clock, which goes on by what its operations took. The one whose clock
    is earliest is next, of those the one served longest ago. A project that was idle saves up no
    claim: its clock is set to that of the last one served.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._until_s: dict[str, float] = {}
        """The clocks of those that are ahead of that."""
        self._count = 0
        self._served: dict[str, int] = {}

    def place(self, project: str) -> tuple[float, int]:
        """The least is next."""
        ahead_s = max(self._now_s, self._until_s.get(project, 0.0))
        return ahead_s, self._served.get(project, 0)

    def serve(self, projects: Sequence[str]) -> None:
        """Their operations begin, those of the first because it was next."""
        self._now_s, _ = self.place(projects[0])
        self._until_s = {one: at for one, at in self._until_s.items() if at > self._now_s}
        self._count += 1
        self._served |= dict.fromkeys(projects, self._count)

    def charge(self, project: str, seconds: float) -> None:
        """So long an operation of it took, or its part of a call that several share."""
        self._until_s[project] = max(self._now_s, self._until_s.get(project, 0.0)) + seconds
