"""`weaver sessions`: who is connected."""

from __future__ import annotations

from weaver.cli.output import Json, ask, show


def sessions(as_json: Json = False) -> None:
    """List the open sessions of clients, and how much each waits for."""
    found = ask(lambda service: service.list_sessions())
    hidden = None if as_json else {"user_metadata"}
    rows = [session.model_dump(mode="json", exclude=hidden) for session in found]
    show(rows, as_json=as_json, empty="No sessions.")
