"""`Origin`: the process and the event loop that a client, its samplers and its handles belong to.

A fork has none of its parent's threads, and an event loop is woken only from within: what is used
elsewhere would wait for ever. Sessions, handles and the sync clients' portal check first.
"""

from __future__ import annotations

import os

from anyio.lowlevel import current_token

from weaver.errors import UnsupportedError


class Process:
    """The process that this is made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises UnsupportedError in a fork of the process."""
        if not self.is_here:
            raise UnsupportedError(
                f"the client was made in process {self._pid}, of which this is a fork: what it "
                "needs does not run here.",
                field="client",
                hint="Make a new client in the child.",
            )


class Origin(Process):
    """The process and the running event loop that this is made in."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = current_token().native_token

    def check(self) -> None:
        """Raises UnsupportedError in a fork, and outside of the event loop."""
        super().check()
        try:
            loop = current_token().native_token
        except RuntimeError:
            loop = None
        if loop is not self._loop:
            raise UnsupportedError(
                "the async client belongs to another event loop than the one that it is used from.",
                field="client",
                hint="Call it where it was entered, make a client of this event loop's own, or "
                "use the sync ServiceClient, which serves every thread.",
            )
