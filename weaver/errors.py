"""Every error that Weaver raises on purpose, as one tree.

The class is for `except`, the stable `code` is for programs and for the wire::

    WeaverError                          weaver_error
    ├── InvalidRequestError (ValueError) invalid_request          before any state changed
    │   ├── InvalidDatumError            invalid_datum            lengths, dtypes, NaN
    │   ├── InvalidParamsError           invalid_params           AdamParams, LoraConfig ...
    │   ├── UnknownLossError             unknown_loss
    │   ├── InvalidLossConfigError       invalid_loss_config
    │   ├── UnknownModelError            unknown_model
    │   ├── TokenOutOfRangeError         token_out_of_range       not in the vocabulary
    │   ├── ContextLengthError           context_length_exceeded
    │   ├── InvalidNameError             invalid_name             names and weaver:// paths
    │   ├── TooLargeError                too_large                above a limit that it names
    │   └── UnsupportedError             unsupported              not possible here, and why
    ├── NotFoundError (LookupError)      not_found
    │   ├── RunNotFoundError             run_not_found
    │   └── CheckpointNotFoundError      checkpoint_not_found
    ├── ConflictError                    conflict                 same seq or id with another body
    │   └── NameTakenError               name_taken
    ├── AuthenticationError              unauthenticated          no key, or an unknown one
    │   └── PermissionDeniedError        permission_denied        needs an admin's key
    ├── QuotaExceededError               quota_exceeded           later, or after freeing something
    ├── CheckpointError                  checkpoint_error
    │   ├── CheckpointCorruptError       checkpoint_corrupt
    │   └── CheckpointMismatchError      checkpoint_mismatch      of another model, rank or mode
    ├── OperationError                   operation_failed         accepted, then failed
    │   ├── NonFiniteError               non_finite               the state is untouched
    │   ├── GradientsDiscardedError      gradients_discarded      an earlier pass failed
    │   ├── NoGradientsError             no_gradients
    │   ├── OperationCancelledError      cancelled
    │   ├── StorageError                 storage_error            disk full, not writable
    │   └── EngineError                  engine_error             a defect, or no memory
    │       └── EngineLostError          engine_lost              what computed it has ended
    ├── WaitTimeoutError (TimeoutError)  timeout                  the operation goes on
    ├── ServiceConnectionError           connection_failed
    ├── ClosedError                      closed                   the client was closed
    ├── MissingDependencyError (Import)  missing_dependency       which extra to install
    └── ConfigError                      invalid_config           a WEAVER_* setting
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import ClassVar

__all__ = ["InvalidRequestError", "WeaverError"]
__all__ += ["InvalidDatumError", "InvalidLossConfigError", "InvalidNameError", "InvalidParamsError"]
__all__ += ["ContextLengthError", "TokenOutOfRangeError", "UnknownLossError", "UnknownModelError"]
__all__ += ["TooLargeError", "UnsupportedError"]
__all__ += ["CheckpointNotFoundError", "NotFoundError", "RunNotFoundError"]
__all__ += ["AuthenticationError", "PermissionDeniedError", "QuotaExceededError"]
__all__ += ["ConflictError", "NameTakenError"]
__all__ += ["CheckpointCorruptError", "CheckpointError", "CheckpointMismatchError"]
__all__ += ["GradientsDiscardedError", "NoGradientsError", "NonFiniteError", "OperationError"]
__all__ += ["EngineError", "EngineLostError", "OperationCancelledError", "StorageError"]
__all__ += ["ClosedError", "ServiceConnectionError", "WaitTimeoutError"]
__all__ += ["ConfigError", "MissingDependencyError"]

CODES: dict[str, type[WeaverError]] = {}
"""The classes of this module by their codes."""


class WeaverError(Exception):
    """Base of all errors. `field` names the argument at fault, `hint` says what to do next."""

    code: ClassVar[str] = "weaver_error"

    def __init_subclass__(cls, *, code: str | None = None) -> None:
        if code is not None:
            cls.code = code
            CODES[code] = cls

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.field = field
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        if not self.hint:
            return f"{where}{self.message}"
        ended = self.message.endswith((".", "!", "?"))
        return f"{where}{self.message}{'' if ended else '.'} {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return (partial(type(self), field=self.field, hint=self.hint), (self.message,))


CODES[WeaverError.code] = WeaverError


class InvalidRequestError(WeaverError, ValueError, code="invalid_request"): ...


class InvalidDatumError(InvalidRequestError, code="invalid_datum"): ...


class InvalidParamsError(InvalidRequestError, code="invalid_params"): ...


class UnknownLossError(InvalidRequestError, code="unknown_loss"): ...


class InvalidLossConfigError(InvalidRequestError, code="invalid_loss_config"): ...


class UnknownModelError(InvalidRequestError, code="unknown_model"): ...


class TokenOutOfRangeError(InvalidRequestError, code="token_out_of_range"): ...


class ContextLengthError(InvalidRequestError, code="context_length_exceeded"): ...


class InvalidNameError(InvalidRequestError, code="invalid_name"): ...


class TooLargeError(InvalidRequestError, code="too_large"): ...


class UnsupportedError(InvalidRequestError, code="unsupported"): ...


class NotFoundError(WeaverError, LookupError, code="not_found"): ...


class RunNotFoundError(NotFoundError, code="run_not_found"): ...


class CheckpointNotFoundError(NotFoundError, code="checkpoint_not_found"): ...


class ConflictError(WeaverError, code="conflict"): ...


class NameTakenError(ConflictError, code="name_taken"): ...


class AuthenticationError(WeaverError, code="unauthenticated"): ...


class PermissionDeniedError(AuthenticationError, code="permission_denied"): ...


class QuotaExceededError(WeaverError, code="quota_exceeded"): ...


class CheckpointError(WeaverError, code="checkpoint_error"): ...


class CheckpointCorruptError(CheckpointError, code="checkpoint_corrupt"): ...


class CheckpointMismatchError(CheckpointError, code="checkpoint_mismatch"): ...


class OperationError(WeaverError, code="operation_failed"): ...


class NonFiniteError(OperationError, code="non_finite"): ...


class GradientsDiscardedError(OperationError, code="gradients_discarded"): ...


class NoGradientsError(OperationError, code="no_gradients"): ...


class OperationCancelledError(OperationError, code="cancelled"): ...


class StorageError(OperationError, code="storage_error"): ...


class EngineError(OperationError, code="engine_error"): ...


class EngineLostError(EngineError, code="engine_lost"): ...


class WaitTimeoutError(WeaverError, TimeoutError, code="timeout"): ...


class ServiceConnectionError(WeaverError, code="connection_failed"): ...


class ClosedError(WeaverError, code="closed"): ...


class MissingDependencyError(WeaverError, ImportError, code="missing_dependency"): ...


class ConfigError(WeaverError, code="invalid_config"): ...


def from_code(
    code: str, message: str, *, field: str | None = None, hint: str | None = None
) -> WeaverError:
    """The error that `code` names; a code of a newer peer becomes a plain `WeaverError`."""
    return CODES.get(code, WeaverError)(message, field=field, hint=hint)


MEANT = {
    "lr": "learning_rate",
    "r": "rank",
    "lora": "lora_config",
    "lora_alpha": "alpha",
    "max_new_tokens": "max_tokens",
    "model": "base_model",
    "n": "num_samples",
}
"""Names that others have for what is called something else here, in the way of `nearest`."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest valid one, or all of them."""
    names = sorted(known)
    if MEANT.get(name) in names:
        return f"Did you mean {MEANT[name]!r}?"
    close = difflib.get_close_matches(name[:80], names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."


@contextmanager
def requiring(what: str, extra: str) -> Iterator[None]:
    """Around the imports that `what` needs, all of which an extra of the package installs.

    Raises:
        MissingDependencyError: one of them is not installed; names it.
        ImportError: as it came, where the package is there and does not load: it is broken.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package) is not None:
            raise
        raise MissingDependencyError(
            f"{what} needs {package}.", hint=f'Run: pip install "weaver-post-training[{extra}]"'
        ) from error
