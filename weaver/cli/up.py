"""`weaver up`: a server to work with at once, its key, and the lines to paste."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from weaver.cli.serve import (
    DEFAULTS,
    Config,
    Project,
    open_keys,
    serve_until_stopped,
    signature_of,
)
from weaver.config import changed, command
from weaver.errors import requiring

if TYPE_CHECKING:
    from weaver.server.serve import Running
    from weaver.server.settings import ServerSettings

KEY = "up"
"""What the keys are called that this command makes."""


def up(
    project: Project = "default",
    config: Config = None,
    **given: Any,
) -> None:
    """Serve, with a key that is made and shown the first time, and the lines to paste."""
    with requiring("the server", "server,engine"):
        from weaver.server.keys import check_names
    check_names(project)
    settings = changed(DEFAULTS, given)
    serve_until_stopped(settings, started=partial(_tell, settings, project))


vars(up)["__signature__"] = signature_of(up)


def _tell(settings: ServerSettings, project: str, server: Running) -> None:
    print(f"Weaver at {server.address}; Ctrl-C stops it.", file=sys.stderr)
    secret = _new_key(settings, project) if settings.auth else "none"
    key = f" WEAVER_API_KEY={secret}" if secret else ""
    print(f"export WEAVER_BASE_URL={server.address}{key}")
    print("export OPENAI_BASE_URL=$WEAVER_BASE_URL/v1 OPENAI_API_KEY=$WEAVER_API_KEY")
    print("export TINKER_BASE_URL=$WEAVER_BASE_URL TINKER_API_KEY=tml-$WEAVER_API_KEY", flush=True)


def _new_key(settings: ServerSettings, project: str) -> str | None:
    """The secret of a new key; None where an earlier start has made and shown one."""
    keys = open_keys(settings.home, settings.database_url)
    mine = [k for k in keys.list() if (k.name, k.project, k.revoked_at) == (KEY, project, None)]
    if not mine:
        info, secret = keys.create(project, name=KEY)
        said = f"Key {info.id} of project {project}. Keep it: it is not shown again."
        print(said, file=sys.stderr)
        return secret
    create = command(f"weaver keys create --project {project}", settings.home)
    print(
        f"Key {mine[-1].id} of project {project} is there; it was shown as it was made. "
        f"`{create}` makes another.",
        file=sys.stderr,
    )
    return None
