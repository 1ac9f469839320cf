"""`Registry`: the runs and sessions that a service has; `Access`: which of them a caller may name.

Asked by `LocalService` of each operation, and by the view of it that a request gets. What belongs
to another project is not found, word for word as what does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weaver.errors import CheckpointNotFoundError, NotFoundError, RunNotFoundError
from weaver.protocol import LoadCheckpoint, OpenSampler, ReleaseSampler, Sample
from weaver.server.checkpoints import SCHEME
from weaver.server.sampling import BASE

if TYPE_CHECKING:
    from weaver.protocol import Operation
    from weaver.server.keys import Caller
    from weaver.server.runs import Run
    from weaver.server.sessions import Session


@dataclass(frozen=True, slots=True)
class Registry:
    runs: dict[str, Run] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    """The project of each run, of deleted ones too: their checkpoints may remain."""
    sessions: dict[str, Session] = field(default_factory=dict)
    """The open ones."""

    def sessions_of(self, project: str) -> list[Session]:
        return [one for one in self.sessions.values() if one.caller.project == project]

    def runs_of(self, project: str) -> list[Run]:
        """May be asked in any thread."""
        return [one for one in list(self.runs.values()) if one.project == project]


def no_run(run_id: str | None) -> RunNotFoundError:
    name = (run_id or "")[:80]
    return RunNotFoundError(f"no run is called {name!r}.", field="run_id", hint="See list_runs().")


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may name of the runs and sessions that there are."""

    caller: Caller
    registry: Registry

    def has_session(self, session_id: str) -> bool:
        """A session has the rights of the caller that opened it, so it is for its equals only."""
        session = self.registry.sessions.get(session_id)
        return session is not None and (self.caller.admin or session.caller == self.caller)

    def lasting_session(self) -> str | None:
        mine = (s for s in self.registry.sessions.values() if s.lasting and s.caller == self.caller)
        return next((session.session_id for session in mine), None)

    def has_run(self, run_id: str) -> bool:
        return self.caller.admin or self.registry.owners.get(run_id) == self.caller.project

    def check_session(self, session_id: str) -> None:
        """Raises NotFoundError."""
        if not self.has_session(session_id):
            raise NotFoundError(
                f"no session is called {session_id[:80]!r}.",
                field="session_id",
                hint="It was closed, or not heard of for too long; open another one.",
            )

    def check_run(self, run_id: str) -> None:
        """Raises RunNotFoundError."""
        if not self.has_run(run_id):
            raise no_run(run_id)

    def check_path(self, path: str) -> None:
        """Raises CheckpointNotFoundError."""
        if self.caller.local:
            return
        if not path.startswith(SCHEME):
            raise CheckpointNotFoundError(
                f"{path[:200]!r} is not on this server.",
                field="path",
                hint="Folders are not opened over the network; use a weaver:// path, or import it.",
            )
        if not self.has_run(path.removeprefix(SCHEME).partition("/")[0]):
            raise CheckpointNotFoundError(
                f"{path[:200]} does not exist.", field="path", hint="See list_checkpoints()."
            )

    def check_operation(self, operation: Operation | None) -> None:
        """Looks at what it names beside its run; raises NotFoundError."""
        match operation:
            case LoadCheckpoint(path=path) | OpenSampler(model_path=str(path)):
                self.check_path(path)
            case Sample(sampler_id=path) | ReleaseSampler(sampler_id=path):
                if path.startswith(SCHEME):
                    self.check_path(path)
                elif not (self.caller.local or path.startswith(BASE)):
                    raise NotFoundError(
                        f"no sampler is called {path[:80]!r}.",
                        field="sampler_id",
                        hint="Open one with OpenSampler.",
                    )
