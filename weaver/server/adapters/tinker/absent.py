"""What Tinker's protocol has and this server does not: refused by name, with what to do instead."""

from __future__ import annotations

from fastapi import APIRouter

from weaver import errors
from weaver.server.adapters.tinker.routes import PREFIX

ABSENT = {
    ("POST", "create_custom_loss"): (
        "losses of its own",
        "Leave custom_loss_server_side off: the client computes the loss itself.",
    ),
    ("POST", "join_sampling_session"): (
        "counters of a sampling session",
        "Leave sample_join_sampling_session off.",
    ),
    ("POST", "copy_weights"): (
        "copies of checkpoints",
        "One belongs to the run that saved it: load it into a new run, and save that.",
    ),
    ("POST", "auth/token"): (
        "tokens in the place of keys",
        "Keys are sent as they are: leave pjwt_auth_enabled off.",
    ),
    ("GET", "audit"): ("audit log", "Its log has each request with its project."),
    ("GET", "billing/usage/events"): ("prices", "Nothing is billed."),
    ("POST", "sessions/search"): ("search of sessions", "List them."),
    ("PUT", "sessions/session-{rest}/project"): (
        "other project for a session",
        "It is of its key's project.",
    ),
    ("GET", "sessions/session-{rest}/trace_export"): (
        "traces of sessions",
        "Start it with OpenTelemetry, or read its metrics.",
    ),
}
"""By method and path: what is not there, and what to do."""

router = APIRouter(prefix=PREFIX, include_in_schema=False)


def _refuse(method: str, path: str, what: str, hint: str) -> None:
    async def absent() -> None:
        raise errors.UnsupportedError(f"this server has no {what}.", hint=hint)

    router.add_api_route(f"/{path}", absent, methods=[method])


for (_method, _path), (_what, _hint) in ABSENT.items():
    _refuse(_method, _path, _what, _hint)
