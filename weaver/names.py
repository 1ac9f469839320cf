"""Names: safe as those of files, of checkpoints and imported files; for people, of runs.

Checked by the clients, the service, and what keeps checkpoints.
"""

from __future__ import annotations

import re
from typing import TypeVar

from weaver.errors import InvalidNameError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RUN_ID = re.compile(r"(run|import)-[0-9a-f]{12}")
LONGEST_RUN_NAME = 128
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


def check_run_name(name: N, *, field: str = "name") -> N:
    """The name that people give a run, if it is None or can be shown and told from an id.

    Raises:
        InvalidNameError
    """
    if name is not None and not (isinstance(name, str) and _is_run_name(name)):
        raise InvalidNameError(
            f"is {str(name)[:140]!r}.",
            field=field,
            hint=f"Use 1 to {LONGEST_RUN_NAME} printable characters, no space at either end, and "
            "neither a run's id nor a path, such as 'words'.",
        )
    return name


def run_name_of(text: object) -> str | None:
    """What of a free text, such as a folder's name, can be a run's name; None: nothing."""
    if not isinstance(text, str):
        return None
    shown = "".join(one if one.isprintable() else " " for one in text)
    name = " ".join(shown.split())[:LONGEST_RUN_NAME].rstrip()
    return name if _is_run_name(name) else None


def numbered(name: str, number: int) -> str:
    """The name for the run that is the `number`-th to ask for it: words, words-2, words-3."""
    suffix = f"-{number}" if number > 1 else ""
    return f"{name[: LONGEST_RUN_NAME - len(suffix)]}{suffix}"


def _is_run_name(name: str) -> bool:
    shown = 0 < len(name) <= LONGEST_RUN_NAME and name.isprintable() and name == name.strip()
    return shown and not (RUN_ID.fullmatch(name) or name.startswith("weaver://"))
