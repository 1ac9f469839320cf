"""The boundary around transformers' code for a model, which may raise anything.

The catalog, the loading and the check of a model enter it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from weaver.errors import EngineError, UnsupportedError, WeaverError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def refusing(what: str, *, hint: str) -> Iterator[None]:
    """Makes an UnsupportedError, `what` and the reason, of whatever is raised within.

    Errors of ours that have a reason already pass, and those for want of memory.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, WeaverError) and not isinstance(error, EngineError)
        if ours or is_out_of_memory(error):
            raise
        raise UnsupportedError(
            f"{what}: {first_line(error)}", field="base_model", hint=hint
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of this machine or of the device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )


def first_line(error: BaseException) -> str:
    """What was raised, in at most 200 characters of one line."""
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
