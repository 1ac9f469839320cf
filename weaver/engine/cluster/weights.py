"""`Weights` of a pool, and the folders of their adapters, which workers read whenever they need to.

A folder that is gone while vLLM needs it ends its whole engine, so that a pool never has it read
one that others may delete or write to: it links the files into one of its own, under a name that
was never used. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    StorageError,
    UnsupportedError,
)

CONFIG, TENSORS, STATE = "adapter_config.json", "adapter_model.safetensors", "weaver_state.json"
SCORE = "base_model.model.score.weight"
"""What a scalar head is called in them."""
LARGEST_HEADER = 2**26


@dataclass(slots=True, eq=False)
class Weights:
    """What a pool's workers can sample from."""

    name: str
    number: int
    """From 1. vLLM keeps what it has computed by the name and adapters by the number."""
    folder: Path | None
    """The pool's own; None is the base model."""
    version: int
    users: int = 0
    """Jobs, and one more until they are released."""

    @property
    def adapter(self) -> dict[str, Any] | None:
        """As workers know it."""
        if self.folder is None:
            return None
        return {"name": self.name, "number": self.number, "folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """What the files of an adapter say without their values."""

    rank: int
    modules: frozenset[str]
    """The last parts of the names of the layers: `q_proj`, `lm_head`."""
    version: int
    """The run's optimizer step; 0 where it is not known."""

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """
        Raises:
            UnsupportedError: a whole model's weights.
            CheckpointCorruptError
        """
        if not (folder / TENSORS).is_file():
            raise UnsupportedError(
                f"{folder.name} holds no adapter; vLLM samples from adapters and base models.",
                field="model_path",
                hint="Serve the whole model by its own name, or sample with torch.",
            )
        shapes = _shapes(folder / TENSORS)
        if SCORE in shapes:
            raise UnsupportedError(
                f"{folder.name} is a reward model; vLLM gives no scores here.",
                field="model_path",
                hint="Score on a server that samples with torch.",
            )
        layers = {
            name.partition(".lora_A.")[0].rpartition(".")[2]: shape[0]
            for name, shape in shapes.items()
            if ".lora_A." in name
        }
        version = 0
        if (folder / STATE).is_file():
            version = int(json.loads((folder / STATE).read_text())["step"])
        return cls(max(layers.values(), default=0), frozenset(layers), version)

    def check(self, *, max_rank: int, modules: frozenset[str]) -> None:
        """Raises CheckpointMismatchError: the workers cannot hold it."""
        if self.rank > max_rank:
            raise CheckpointMismatchError(
                f"has rank {self.rank}, the workers take {max_rank} at most.",
                field="model_path",
                hint="Raise --sampler-max-rank.",
            )
        if unknown := sorted(self.modules - modules):
            raise CheckpointMismatchError(
                f"adapts {', '.join(unknown)}, which vLLM does not for this model.",
                field="model_path",
                hint="Train other layers, or sample with torch.",
            )


def _shapes(file: Path) -> dict[str, list[int]]:
    """Of all tensors of a file of safetensors: a length in 8 bytes, the lowest first, then JSON."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > LARGEST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(opened.read(size))
        return {name: value["shape"] for name, value in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(
            f"{file.parent.name}/{file.name} cannot be read: {error}",
            field="model_path",
            hint="Use another checkpoint, or copy it again.",
        ) from error


class Shelf:
    """A folder of the pool's own for the folders of its weights; blocks, in any thread.

    Raises:
        StorageError: of each method but `close`: the disk is full or not writable.
    """

    def __init__(self, parent: Path) -> None:
        """`parent`: all workers see it. What processes of this machine have left there goes."""
        prefix = f"{socket.gethostname()}-"
        for left in parent.glob(f"{prefix}*"):
            pid = left.name.removeprefix(prefix).partition("-")[0]
            if pid.isdecimal() and not _runs(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
        self.folder = self._made(parent / f"{prefix}{os.getpid()}-{uuid.uuid4().hex}")

    @staticmethod
    def sweep(parent: Path) -> None:
        """Removes what processes of any machine have left, where none but this uses the parent."""
        for left in parent.glob("*-*-*"):
            if re.fullmatch(r".+-\d+-[0-9a-f]{32}", left.name):
                shutil.rmtree(left, ignore_errors=True)

    def new(self) -> Path:
        """An empty folder, of a name that was never used."""
        return self._made(self.folder / uuid.uuid4().hex)

    def take(self, source: Path) -> Path:
        """A folder with the adapter of another, which may go then."""
        folder = self.new()
        try:
            for name in (CONFIG, TENSORS):
                try:
                    os.link(source / name, folder / name)
                except OSError:  # of another disk, or one without links
                    shutil.copyfile(source / name, folder / name)
        except OSError as error:
            self.drop(folder)
            raise _storage(folder, error) from error
        return folder

    def drop(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _made(self, folder: Path) -> Path:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise _storage(folder, error) from error
        return folder


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _storage(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {folder}: {error.strerror or error}",
        hint="Free some space or check the permissions.",
    )
