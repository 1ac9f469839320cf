"""Who asks: `Caller`, whose rights a request, its session and its operations have; and API `Keys`.

Keys are used by the server's front and by `weaver keys`. One is `wv-` and 32 random bytes in
base64. Only its SHA-256 is kept: 256 random bits cannot be guessed from it, so it needs no slow
hash. The key itself is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import sqlalchemy as sa
from pydantic import AfterValidator

from weaver.errors import AuthenticationError, InvalidNameError
from weaver.server.database import transaction
from weaver.server.tables import keys
from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "wv-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
Utc = Annotated[datetime, AfterValidator(lambda at: at if at.tzinfo else at.replace(tzinfo=UTC))]
"""SQLite forgets the time zone."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. An admin sees every project, and creates in its own."""

    project: str
    admin: bool = False
    local: bool = False
    """In this process: may name folders of this machine, and is told them."""


OWNER = Caller("default", admin=True, local=True)
"""Who asks where a service is not shared."""


class KeyInfo(Value):
    """A key without its secret."""

    id: str
    project: str
    name: str
    admin: bool
    created_at: Utc
    revoked_at: Utc | None = None


class Keys:
    """The keys of one database. Its methods block for the time of a query.

    Raises:
        ServiceConnectionError: from any of them, while the database is away.
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database

    def create(self, project: str, *, name: str = "", admin: bool = False) -> tuple[KeyInfo, str]:
        """A new key and its secret, which nobody can read again.

        Raises:
            InvalidNameError: a project or key name with other characters than letters, digits, _.-
        """
        check_names(project, name)
        secret = PREFIX + secrets.token_urlsafe(32)
        info = KeyInfo(
            id=secrets.token_hex(4),
            project=project,
            name=name,
            admin=admin,
            created_at=datetime.now(UTC),
        )
        row = {**info.model_dump(), "hash": _hash(secret)}
        with transaction(self._database) as connection:
            connection.execute(keys.insert().values(row))
        return info, secret

    def list(self) -> Sequence[KeyInfo]:
        """All keys, revoked ones too, oldest first."""
        told = [keys.c[name] for name in KeyInfo.model_fields]
        with transaction(self._database) as connection:
            rows = connection.execute(sa.select(*told).order_by(keys.c.created_at))
            return [KeyInfo(**row._mapping) for row in rows]

    def revoke(self, key_id: str) -> None:
        """Ends a key; takes effect within a second. Does nothing to one that was revoked."""
        query = keys.update().where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
        with transaction(self._database) as connection:
            connection.execute(query.values(revoked_at=datetime.now(UTC)))

    def authenticate(self, secret: str) -> Caller:
        """Whose key it is.

        Raises:
            AuthenticationError: unknown or revoked, without saying which.
        """
        wanted = _hash(secret)
        query = sa.select(keys).where(keys.c.hash == wanted, keys.c.revoked_at.is_(None))
        with transaction(self._database) as connection:
            row = connection.execute(query).one_or_none()
        if row is None or not hmac.compare_digest(row.hash, wanted):
            raise AuthenticationError(
                "the API key is unknown or was revoked.",
                hint="Set WEAVER_API_KEY to a key that `weaver keys create` made on this server.",
            )
        return Caller(row.project, row.admin)


def check_names(project: str, name: str = "") -> None:
    """Raises InvalidNameError: a project or key name with other characters than those."""
    for field, text in (("project", project), ("name", name or "key")):
        if not NAME.fullmatch(text):
            raise InvalidNameError(
                f"is {text!r}.", field=field, hint="Use at most 64 letters, digits, '_.-'."
            )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
