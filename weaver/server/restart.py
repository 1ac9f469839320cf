"""What a service takes up from its store when it starts. Called by `LocalService`."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from anyio import to_thread

from weaver.boundary import attempt_async
from weaver.errors import OperationError, WeaverError
from weaver.protocol import Outcome, Submission
from weaver.server.keys import Caller
from weaver.server.recovery import adopt, forget_files
from weaver.server.runs import Run
from weaver.server.sessions import Session, Ticket
from weaver.wire import about_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.server.checkpoints import Checkpoints
    from weaver.server.journal import Journal
    from weaver.server.records import Entry, Passed
    from weaver.server.registry import Registry

logger = logging.getLogger(__name__)
LOST = OperationError(
    "it was carried out, and its outcome lost with the database's last commits.",
    hint="What it did to its run has lasted; look at the run's step.",
)


async def restore(store: Journal, live: Checkpoints, registry: Registry) -> list[Ticket]:
    """Takes up runs, open sessions and pending work.

    No run is loaded: its next operation brings it back. The tickets are for the lanes, in their
    order: what is pending, and what is settled but not passed over.

    Raises:
        StorageError: the database cannot be read; a damaged entry in it fails alone.
    """
    records = {record.run.run_id: record for record in await store.runs()}
    registry.runs.update({run_id: Run.of(record) for run_id, record in records.items()})
    registry.owners.update(await store.owners())
    await _finish_deletions(store, live, registry)
    if store.keeps != "everything":
        return []
    for run in list(registry.runs.values()):
        taken = await attempt_async(adopt, store, live, run, records[run.run_id])
        if isinstance(taken, WeaverError):
            logger.warning("the snapshots of %s cannot be looked at: %s", run.run_id, taken)
    sessions = {one.session_id: Session.of(one) for one in await store.sessions()}
    registry.sessions.update({id: one for id, one in sessions.items() if not one.closed})
    for session_id, name, value in await store.names():
        if session_id in registry.sessions:
            registry.sessions[session_id].names[name] = value
    entries = await store.entries()
    by_session: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_session[entry.session_id].append(entry)
    for session_id, session in registry.sessions.items():
        session.restore(by_session[session_id])
    passed = await store.passed()
    next_seqs = _next_seqs(entries, passed)
    for run in registry.runs.values():
        for session_id, seq in run.last_seqs.items():
            place = session_id, run.run_id
            next_seqs[place] = max(seq + 1, next_seqs.get(place, 1))
    for one in passed:
        registry.sessions[one.session_id].pass_over(one)
        if one.run_id in registry.runs:
            inbox = registry.runs[one.run_id].lane.inbox(one.session_id)
            inbox.passed.append((one.first, one.last))
    for (session_id, run_id), seq in next_seqs.items():
        if run_id in registry.runs:
            inbox = registry.runs[run_id].lane.inbox(session_id)
            inbox.next_seq = seq
            inbox.skip()
            registry.runs[run_id].last_seqs[session_id] = seq - 1
    tickets = _tickets(entries, registry.runs, sessions=sessions, next_seqs=next_seqs)
    await to_thread.run_sync(_take_up_samplers, live, registry.sessions)
    return tickets


async def _finish_deletions(store: Journal, live: Checkpoints, registry: Registry) -> None:
    """Removes the files of runs that were deleted by a process that ended before it did so.

    Other databases may have runs in this home, so only what this one has known is looked at.
    """
    folders = await to_thread.run_sync(lambda: list(live.root.glob("*/")))
    for folder in folders:
        deleted = folder.name in registry.owners and folder.name not in registry.runs
        if deleted and await attempt_async(store.run, folder.name) is None:  # not damaged
            await to_thread.run_sync(forget_files, folder)


def _next_seqs(entries: Sequence[Entry], passed: Sequence[Passed]) -> dict[tuple[str, str], int]:
    """For each session and run, the seq whose turn it is: after the last that was executed.

    Where nothing that was executed is remembered, the first that is.
    """
    executed: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], int] = {}
    for one in passed:
        place = one.session_id, one.run_id
        first[place] = min(first.get(place, one.first), one.first)
    for entry in entries:
        if entry.run_id is None or entry.seq is None:
            continue
        place = entry.session_id, entry.run_id
        first[place] = min(first.get(place, entry.seq), entry.seq)
        if entry.executed:
            executed[place] = max(executed.get(place, 0), entry.seq)
    return first | {place: seq + 1 for place, seq in executed.items()}


def _tickets(
    entries: Sequence[Entry],
    runs: dict[str, Run],
    *,
    sessions: dict[str, Session],
    next_seqs: Mapping[tuple[str, str], int],
) -> list[Ticket]:
    lost = _lost(entries)
    tickets = []
    for i, entry in enumerate(entries):
        nobody = Session(entry.session_id, Caller(""), closed=True)
        session = sessions.setdefault(entry.session_id, nobody)
        if isinstance(entry.submission, Submission):
            next_seq = next_seqs.get((entry.session_id, entry.run_id or ""), 1)
            done = LOST if entry.seq and entry.seq < next_seq else None
            size = about_bytes(entry.submission)
            tickets.append(session.ticket(entry.submission, size, error=done))
        elif entry.submission is not None:
            stand_in = _stand_in(entry, lost_gradient=True)
            tickets.append(session.ticket(stand_in, 0, error=entry.submission))
        elif not entry.executed and entry.run_id in runs and entry.seq is not None:
            error = _error(entry)
            if entry.seq >= next_seqs[entry.session_id, entry.run_id]:
                stand_in = _stand_in(entry, lost_gradient=i in lost)
                tickets.append(Ticket(session, stand_in, error=error, settled=True))
            elif i in lost:
                reason = f"seq {entry.seq}: {error}"
                runs[entry.run_id].lane.discard(reason)
    return tickets


def _lost(entries: Sequence[Entry]) -> set[int]:
    """Those entries, by index, for want of which a batch that is not stepped yet lacks a part."""
    seqs: dict[tuple[str, str | None], int] = {}
    """That of the last step, by session and run."""
    steps: dict[str | None, list[tuple[int, str]]] = defaultdict(list)
    """By run: the index and the session of each step."""
    for i, entry in enumerate(entries):
        if entry.ended_batch:
            place = entry.session_id, entry.run_id
            seqs[place] = max(seqs.get(place, 0), entry.seq or 0)
            steps[entry.run_id].append((i, entry.session_id))
    lost = set()
    for i, entry in enumerate(entries):
        own = seqs.get((entry.session_id, entry.run_id), 0)
        if entry.lost_gradient and (entry.seq or 0) > own:
            others = (at for at, id in steps[entry.run_id] if id != entry.session_id)
            if max(others, default=-1) < i:
                lost.add(i)
    return lost


def _error(entry: Entry) -> WeaverError:
    if isinstance(entry.outcome, Outcome) and entry.outcome.error is not None:
        return entry.outcome.error.to_error()
    return OperationError("it had failed before the server was started anew.")


def _stand_in(entry: Entry, *, lost_gradient: bool) -> Submission:
    return Submission(
        id=entry.submission_id,
        operation=None,
        run_id=entry.run_id,
        seq=entry.seq,
        lost_gradient=lost_gradient,
    )


def _take_up_samplers(live: Checkpoints, sessions: Mapping[str, Session]) -> None:
    """Gives samplers without a name back to their sessions; those of closed ones go."""
    for info in live.list():
        if info.kind == "sampler":
            try:
                session = sessions.get(live.manifest(info.path).author.partition("/")[0])
                if session is None:
                    live.delete(info.path)
                else:
                    session.unnamed_samplers.append(info.path)
            except WeaverError:
                continue  # damaged: it fails by name when it is asked for
