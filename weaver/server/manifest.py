"""`Manifest`: what a checkpoint's folder says of it, as `Checkpoints` writes and reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from weaver.errors import CheckpointCorruptError
from weaver.files import flush
from weaver.types import CheckpointInfo, Value

MANIFEST = "manifest.json"


class Manifest(Value):
    """What the folder of a checkpoint says of it."""

    checkpoint: CheckpointInfo
    sha256: Mapping[str, str]
    """Those of its files, by name."""
    author: str = ""
    """Whose submission wrote it."""
    last_seqs: Mapping[str, int] = Field(default_factory=dict)
    """The last seq of each session that is in a snapshot."""

    @property
    def folder(self) -> Path:
        """Where it was read from."""
        return Path(self.checkpoint.folder or "")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    draft = folder / f".{MANIFEST}"
    draft.write_text(manifest.model_dump_json(indent=1, exclude={"checkpoint": {"folder"}}))
    flush(draft)
    draft.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise corrupt(folder, MANIFEST, f"cannot be read ({type(error).__name__})") from error
    info = manifest.checkpoint.model_copy(update={"folder": str(folder)})
    return manifest.model_copy(update={"checkpoint": info})


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def corrupt(folder: Path, file: str, what: str) -> CheckpointCorruptError:
    """Its folder's place on this machine is not for everybody who may load it."""
    return CheckpointCorruptError(
        f"{file} in {folder.name} {what}.",
        field="path",
        hint="Load another checkpoint; delete this one.",
    )
