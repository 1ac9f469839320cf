"""What is asked and told beside operations: exports, imports, what is deleted, what a server is.

Part of the protocol; `Service` takes and answers these.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from fnmatch import fnmatchcase

from pydantic import Field

from weaver import fields, types
from weaver.errors import InvalidParamsError

IMPORT_PIECE_BYTES = 4 * 2**20
"""Files of an import are sent in pieces of so many bytes, but for their last."""


class ServerInfo(types.Value):
    """What a server tells of itself: its versions, its device, and what its machine has left."""

    version: str
    python: str
    platform: str
    torch: str | None
    """None where it is not installed."""
    protocol: int
    device: str
    """`torch 2.13 on cpu (as set), float32, 2 threads`"""
    device_bytes: int | None = None
    """Memory of the accelerator; None on a CPU, as the next."""
    device_free_bytes: int | None = None
    memory_bytes: int | None = None
    """Of the machine, or its container; None where the system does not tell, as the next."""
    memory_free_bytes: int | None = None
    disk_bytes: int
    """Of its home's disk."""
    disk_free_bytes: int


class ExportedFile(types.Value):
    """`name` has no folder in it."""

    name: fields.ShortText
    size_bytes: int = Field(ge=0, lt=2**63)
    sha256: fields.ShortText


class Export(types.Value):
    """What other programs read of a checkpoint."""

    files: tuple[ExportedFile, ...]
    folder: str | None = None
    """Where they lie on this machine; None when a server keeps them."""


class Import(types.Value):
    """A checkpoint to be made of files that were sent: an adapter of PEFT's, or a whole model."""

    files: tuple[ExportedFile, ...] = Field(min_length=1, max_length=1024, fail_fast=True)
    base_model: fields.PathText | None = None
    """None: the one that the adapter names."""
    name: fields.ShortText = "imported"
    ttl_seconds: int | None = Field(default=None, ge=1, le=2**31, strict=True)


class Selection(types.Value):
    """Which checkpoints: those for which all that is given holds."""

    run_id: fields.ShortText | None = None
    pattern: fields.ShortText | None = None
    """As of a shell, of their names; of their whole paths where it has a `/`."""
    older_than_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Seconds since they were written."""

    def check(self) -> None:
        """Raises InvalidParamsError: nothing is given, which would be all of them."""
        if self.run_id is None and self.pattern is None and self.older_than_s is None:
            raise InvalidParamsError(
                "needs a run, a pattern or an age.",
                field="delete_checkpoints",
                hint='The pattern "*" is all of them.',
            )

    def fits(self, checkpoint: types.CheckpointInfo, *, now: datetime) -> bool:
        name = checkpoint.path if "/" in (self.pattern or "") else checkpoint.name
        return (
            self.run_id in (None, checkpoint.run_id)
            and (self.pattern is None or fnmatchcase(name, self.pattern))
            and (
                self.older_than_s is None
                or now - checkpoint.created_at >= timedelta(seconds=self.older_than_s)
            )
        )
