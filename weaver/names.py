"""Names that are safe as those of files and folders: of checkpoints, runs and imported files.

Checked by the clients, the service, and what keeps checkpoints.
"""

from __future__ import annotations

import re
from typing import TypeVar

from weaver.errors import InvalidNameError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
N = TypeVar("N", bound=str | None)


def check_name(name: N, *, field: str = "name") -> N:
    """The name of a checkpoint or run itself, if it is None or safe as a folder's name.

    Raises:
        InvalidNameError
    """
    if name is not None and not (isinstance(name, str) and SAFE_NAME.fullmatch(name)):
        raise InvalidNameError(
            f"is {str(name)[:140]!r}.",
            field=field,
            hint="Use 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit, "
            "such as 'step-100'.",
        )
    return name
