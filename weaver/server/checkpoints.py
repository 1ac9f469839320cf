"""Checkpoints on disk: `weaver://<run_id>/<weights|sampler>/<name>` under the service's home.

The folder is the truth: nothing is cached, so that several processes can share a home. A checkpoint
is complete or absent: it is written beside its place, flushed, and renamed into it. Such a draft is
locked while its process lives: one without a lock is what a killed process has left. All functions
block; the service calls them from worker threads.
"""

from __future__ import annotations

import logging
import shutil
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from weaver.boundary import attempt
from weaver.errors import (
    CheckpointNotFoundError,
    InvalidNameError,
    NameTakenError,
    StorageError,
    WeaverError,
)
from weaver.files import DRAFT, draft_in, flush, hold_draft, release_lock, sweep_draft
from weaver.names import SAFE_NAME, check_name
from weaver.server.manifest import (
    MANIFEST,
    Manifest,
    corrupt,
    read_manifest,
    sha256_of,
    write_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weaver.types import CheckpointInfo

logger = logging.getLogger(__name__)

SCHEME = "weaver://"
GROUPS = ("weights", "sampler")
REPLACED = ".replaced-"


def now_utc() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint is: the parts of its path, each safe as a folder's name."""

    run_id: str
    group: str
    name: str

    def __post_init__(self) -> None:
        check_name(self.run_id, field="path")
        check_name(self.name)

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.group}/{self.name}"

    @classmethod
    def parse(cls, path: str) -> Location:
        """Reads a `weaver://` path.

        Raises:
            InvalidNameError
        """
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in GROUPS:
            raise InvalidNameError(
                f"is {path[:200]!r}.",
                field="path",
                hint="A checkpoint's path is weaver://<run_id>/<weights|sampler>/<name>.",
            )
        return cls(*parts)


class Checkpoints:
    """All checkpoints below one folder of a home."""

    def __init__(
        self, home: Path, *, folder: str = "runs", now: Callable[[], datetime] = now_utc
    ) -> None:
        self.root = home / folder
        self._now = now
        self._changing = threading.RLock()
        self.freed_bytes = 0
        """Of what had expired, and of what sweeps have found, since this began."""
        self._drafts: dict[Path, int] = {}
        """Those of this process, with their locks."""

    def write(
        self,
        info: CheckpointInfo,
        fill: Callable[[Path], None],
        *,
        author: str = "",
        overwrite: bool = False,
        last_seqs: Mapping[str, int] | None = None,
    ) -> CheckpointInfo:
        """Saves what `fill` puts into an empty folder; answers `info` with its times and size.

        Raises:
            NameTakenError: it exists, and `overwrite` is not set.
            StorageError: the disk is full or not writable; nothing was left behind.
        """
        done = self.written(info, author=author, overwrite=overwrite)
        if done is not None:
            return done
        draft = self.draft(Location.parse(info.path))
        try:
            with storage_errors(f"saving {info.path}"):
                fill(draft)
            return self.commit(draft, info, author=author, last_seqs=last_seqs)
        finally:
            self.discard(draft)

    def written(
        self, info: CheckpointInfo, *, author: str, overwrite: bool
    ) -> CheckpointInfo | None:
        """What the same `author` has written there, which is kept: nothing is done twice.

        Raises:
            NameTakenError: another one has, and `overwrite` is not set.
        """
        found = self._find(Location.parse(info.path))
        if found is not None and author and found.author == author:
            return found.checkpoint
        if found is not None and not overwrite:
            raise NameTakenError(
                f"{info.path} exists already.", field="name", hint="Set overwrite=True."
            )
        return None

    def draft(self, location: Location) -> Path:
        """An empty folder to be filled, for `commit` or `discard`.

        Raises:
            StorageError
        """
        with storage_errors(f"saving {location}"):
            draft, lock = hold_draft(self._folder(location).parent)
        self._drafts[draft] = lock
        return draft

    def commit(
        self,
        draft: Path,
        info: CheckpointInfo,
        *,
        author: str = "",
        last_seqs: Mapping[str, int] | None = None,
    ) -> CheckpointInfo:
        """Flushes a draft to the disk and puts it in its place."""
        place = self._folder(Location.parse(info.path))
        try:
            with storage_errors(f"saving {info.path}"):
                files = sorted(path for path in draft.rglob("*") if path.is_file())
                now = self._now()
                info = info.model_copy(
                    update={
                        "folder": None,
                        "created_at": now,
                        "size_bytes": sum(path.stat().st_size for path in files),
                        "expires_at": _expiry(now, info.ttl_seconds),
                    }
                )
                sums = {str(path.relative_to(draft)): sha256_of(path) for path in files}
                manifest = Manifest(
                    checkpoint=info, sha256=sums, author=author, last_seqs=last_seqs or {}
                )
                write_manifest(draft, manifest)
                for path in (*files, draft):
                    flush(path)
                with self._changing:
                    _swap(draft, place)
        finally:
            self.discard(draft)
        return info.model_copy(update={"folder": str(place)})

    def discard(self, draft: Path) -> None:
        """Gives up what was not committed."""
        shutil.rmtree(draft, ignore_errors=True)
        lock = self._drafts.pop(draft, None)
        if lock is not None:
            release_lock(lock)

    def get(self, path: str) -> CheckpointInfo:
        """Raises what `manifest` raises."""
        return self.manifest(path).checkpoint

    def look_up(self, path: str) -> CheckpointInfo:
        """By its path or by its folder, whose files are not verified. Raises as `open`."""
        return (self.manifest(path) if path.startswith(SCHEME) else _of_folder(path)).checkpoint

    def manifest(self, path: str) -> Manifest:
        """Raises CheckpointNotFoundError, CheckpointCorruptError, InvalidNameError."""
        location = Location.parse(path)
        found = self._find(location)
        if found is None:
            raise _not_found(location)
        return found

    def open(self, path: str) -> tuple[CheckpointInfo, Path]:
        """A checkpoint, by its path or by its folder, with its files verified.

        Raises:
            CheckpointNotFoundError
            CheckpointCorruptError: a file is missing or has changed; names it.
        """
        manifest = self.manifest(path) if path.startswith(SCHEME) else _of_folder(path)
        folder = manifest.folder
        for name, expected in manifest.sha256.items():
            file = folder / name
            if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
                raise corrupt(folder, name, "is missing")
            if sha256_of(file) != expected:
                raise corrupt(folder, name, "has changed since it was written")
        return manifest.checkpoint, folder

    def list(self, run_id: str | None = None) -> list[CheckpointInfo]:
        """By time; one that cannot be read is left out, and logged."""
        found = []
        for location in self._locations(run_id):
            try:
                if (manifest := self._find(location)) is not None:
                    found.append(manifest.checkpoint)
            except WeaverError as error:
                logger.warning("left out of the list: %s", error)
        return sorted(found, key=lambda info: (info.created_at, info.path))

    def delete(self, path: str) -> None:
        """Raises CheckpointNotFoundError, InvalidNameError, StorageError."""
        location = Location.parse(path)
        with self._changing:
            if self._existing(location) is None:
                raise _not_found(location)
            self._remove(location)

    def delete_all(self, paths: Sequence[str]) -> Sequence[str]:
        """Those that were there and are deleted; one that cannot be is logged, and stays."""
        gone = []
        for path in paths:
            done = attempt(self.delete, path)
            if done is None:
                gone.append(path)
            elif not isinstance(done, CheckpointNotFoundError):
                logger.warning("not deleted: %s", done)
        return gone

    def set_ttl(self, path: str, ttl_seconds: int | None) -> CheckpointInfo:
        """Counts from now; None keeps it for ever."""
        with storage_errors(f"setting the lifetime of {path}"), self._changing:
            manifest = self.manifest(path)
            expires_at = _expiry(self._now(), ttl_seconds)
            lifetime = {"ttl_seconds": ttl_seconds, "expires_at": expires_at}
            info = manifest.checkpoint.model_copy(update=lifetime)
            write_manifest(manifest.folder, manifest.model_copy(update={"checkpoint": info}))
        return info

    def sweep(self) -> None:
        """Deletes what has expired, and what a process that died left half written."""
        self.list()
        for draft in {*self.root.glob(f"*/*/{DRAFT}*")} - self._drafts.keys():
            self.freed_bytes += sweep_draft(draft)

    def _folder(self, location: Location) -> Path:
        return self.root / location.run_id / location.group / location.name

    def _existing(self, location: Location) -> Path | None:
        place = self._folder(location)
        return next((f for f in (place, _replaced(place), place) if f.is_dir()), None)

    def _find(self, location: Location) -> Manifest | None:
        """What is there, unless it has expired (then it goes)."""
        with self._changing:
            folder = self._existing(location)
            if folder is None:
                return None
            manifest = read_manifest(folder)
            expires_at = manifest.checkpoint.expires_at
            if expires_at is not None and expires_at <= self._now():
                self._remove(location)
                self.freed_bytes += manifest.checkpoint.size_bytes
                return None
            return manifest

    def _remove(self, location: Location) -> None:
        place = self._folder(location)
        with storage_errors(f"deleting {location}"), self._changing:
            for folder in (_replaced(place), place):
                if folder.is_dir():
                    doomed = draft_in(place.parent)
                    folder.rename(doomed)  # gone at once, however long the files take
                    shutil.rmtree(doomed, ignore_errors=True)

    def _locations(self, run_id: str | None) -> set[Location]:
        run = "*" if run_id is None else check_name(run_id, field="run_id")
        names = ((f, f.name.removeprefix(REPLACED)) for f in self.root.glob(f"{run}/*/*"))
        return {
            Location(folder.parts[-3], folder.parts[-2], name)
            for folder, name in names
            if folder.parts[-2] in GROUPS and SAFE_NAME.fullmatch(name)
        }


def _replaced(place: Path) -> Path:
    """Where the former content of `place` is while a new one takes its place."""
    return place.parent / f"{REPLACED}{place.name}"


def _swap(draft: Path, place: Path) -> None:
    """Puts `draft` at `place`. At every moment, a reader (or a crash) finds the old or the new."""
    replaced = _replaced(place)
    if place.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    draft.rename(place)
    flush(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _expiry(start: datetime, ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else start + timedelta(seconds=ttl_seconds)


def _of_folder(path: str) -> Manifest:
    folder = Path(path).expanduser().absolute()
    if not (folder / MANIFEST).is_file():
        raise CheckpointNotFoundError(
            f"{folder} has no {MANIFEST}.",
            field="path",
            hint="Give a weaver:// path, or a folder that save_state wrote; import others.",
        )
    return read_manifest(folder)


def _not_found(location: Location) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"there is no checkpoint {location}.",
        field="path",
        hint="See list_checkpoints(). A sampler without a name ends with its session.",
    )


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{doing} failed: {error.strerror or error}.",
            hint="Check the free space and the permissions of the service's home.",
        ) from error
