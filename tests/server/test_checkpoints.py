"""Checkpoints on disk: all or nothing, verified, of limited life."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weaver.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    InvalidNameError,
    NameTakenError,
    StorageError,
)
from weaver.server import checkpoints as module
from weaver.server import manifest
from weaver.server.checkpoints import Checkpoints, Location
from weaver.types import CheckpointInfo, LoraConfig

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

WHERE = Location("run-1", "weights", "x")
PATH = str(WHERE)


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk(home: Path, clock: Clock) -> Checkpoints:
    return Checkpoints(home, now=clock)


def describe(location: Location, ttl_seconds: int | None = None) -> CheckpointInfo:
    return CheckpointInfo(
        path=str(location),
        run_id=location.run_id,
        name=location.name,
        kind="weights",
        base_model="fake",
        training_mode="lora",
        lora_config=LoraConfig(),
        step=1,
        created_at=datetime.now(UTC),
        size_bytes=0,
        ttl_seconds=ttl_seconds,
    )


def write(
    disk: Checkpoints,
    content: str = "one",
    *,
    location: Location = WHERE,
    ttl_seconds: int | None = None,
    overwrite: bool = False,
) -> CheckpointInfo:
    def fill(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_text(content)

    return disk.write(describe(location, ttl_seconds), fill, overwrite=overwrite)


def content(disk: Checkpoints) -> str:
    return (disk.open(PATH)[1] / "sub" / "data").read_text()


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob(".*")]


def test_what_was_written_is_read(disk: Checkpoints, home: Path) -> None:
    info = write(disk)
    assert info.size_bytes == 3 and info.folder == str(home / "runs/run-1/weights/x")
    assert disk.get(PATH) == info == disk.open(PATH)[0] == disk.open(str(info.folder))[0]
    assert disk.list() == disk.list("run-1") == [info]
    assert disk.list("run-2") == [] and leftovers(home) == []


@pytest.mark.parametrize(
    "path",
    [
        "weaver://run-1/weights/../x",
        "weaver://run-1/weights/..",
        "weaver://../weights/x",
        "weaver://run-1/other/x",
        "weaver://run-1/weights/",
        "weaver://run-1/weights/x\n",
        "weaver://run-1/weights/x\0",
        "weaver:///weights/x",
        "run-1/weights/x",
    ],
)
def test_a_path_cannot_leave_its_place(disk: Checkpoints, path: str) -> None:
    for call in (disk.get, disk.delete):
        with pytest.raises(InvalidNameError):
            call(path)


def test_a_name_is_taken_unless_overwritten(disk: Checkpoints, home: Path) -> None:
    write(disk)
    with pytest.raises(NameTakenError):
        write(disk, "two")
    assert content(disk) == "one"
    write(disk, "two", overwrite=True)
    assert content(disk) == "two" and leftovers(home) == []


def test_a_failure_leaves_nothing_behind(disk: Checkpoints, home: Path) -> None:
    write(disk)

    def full(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise OSError(28, "No space left on device")

    for location in (WHERE, Location("run-2", "weights", "y")):
        with pytest.raises(StorageError, match="No space left on device"):
            disk.write(describe(location), full, overwrite=True)
    assert content(disk) == "one" and leftovers(home) == [] and len(disk.list()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_named(disk: Checkpoints, home: Path) -> None:
    home.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        write(disk)


def test_a_crash_while_overwriting_leaves_the_old_or_the_new(
    disk: Checkpoints, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(disk)

    class Crash(BaseException):
        pass

    renames = 0
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        nonlocal renames
        if self.name.startswith(".draft") and target.name == "x":
            raise Crash
        renames += 1
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Crash):
        write(disk, "two", overwrite=True)
    monkeypatch.undo()
    assert renames and not (home / "runs/run-1/weights/x").exists()
    assert content(disk) == "one" and [info.name for info in disk.list()] == ["x"]
    with pytest.raises(NameTakenError):
        write(disk, "two")
    write(disk, "two", overwrite=True)
    assert content(disk) == "two" and leftovers(home) == []


def test_readers_during_overwrites_see_a_whole_checkpoint(disk: Checkpoints) -> None:
    write(disk, "0")
    done = threading.Event()

    def overwrite() -> None:
        for i in range(30):
            write(disk, str(i), overwrite=True)
        done.set()

    writer = threading.Thread(target=overwrite)
    writer.start()
    reads = 0
    while not done.is_set():
        assert disk.get(PATH).size_bytes in (1, 2)
        reads += 1
    writer.join()
    assert reads and content(disk) == "29"


def test_a_changed_or_missing_file_is_named(disk: Checkpoints) -> None:
    folder = Path(write(disk).folder or "")
    (folder / "sub" / "data").write_text("two")
    with pytest.raises(CheckpointCorruptError, match=r"sub/data in x has changed"):
        disk.open(PATH)
    (folder / "sub" / "data").unlink()
    with pytest.raises(CheckpointCorruptError, match=r"sub/data in x is missing"):
        disk.open(PATH)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"checkpoint": {}, "sha256": {}}'])
def test_a_broken_manifest_spoils_no_list_and_can_be_deleted(disk: Checkpoints, text: str) -> None:
    folder = Path(write(disk).folder or "")
    write(disk, location=Location("run-1", "weights", "y"))
    (folder / "manifest.json").write_text(text)
    assert [info.name for info in disk.list()] == ["y"]
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json"):
        disk.get(PATH)
    disk.sweep()
    disk.delete(PATH)
    with pytest.raises(CheckpointNotFoundError):
        disk.get(PATH)


def test_a_manifest_cannot_point_out_of_its_folder(disk: Checkpoints, tmp_path: Path) -> None:
    folder = Path(write(disk).folder or "")
    (tmp_path / "secret").write_text("one")
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text())
    body["sha256"] = {str(tmp_path / "secret"): body["sha256"]["sub/data"]}
    manifest.write_text(json.dumps(body))
    with pytest.raises(CheckpointCorruptError):
        disk.open(PATH)


def test_a_lifetime_ends(disk: Checkpoints, home: Path, clock: Clock) -> None:
    write(disk, ttl_seconds=60)
    other = Location("run-1", "weights", "y")
    write(disk, location=other, ttl_seconds=60)
    clock.time += timedelta(seconds=59)
    assert len(disk.list()) == 2
    assert disk.set_ttl(str(other), 10).expires_at == clock.time + timedelta(seconds=10)
    clock.time += timedelta(seconds=1)
    with pytest.raises(CheckpointNotFoundError):
        disk.get(PATH)
    assert [info.name for info in disk.list()] == ["y"]
    write(disk)  # the name is free again
    clock.time += timedelta(seconds=10)
    disk.sweep()
    assert not (home / "runs/run-1/weights/y").exists() and content(disk) == "one"


def test_what_a_killed_process_left_is_swept_and_a_living_one_keeps_its_draft(
    disk: Checkpoints, home: Path
) -> None:
    write(disk)
    location = Location("run-1", "weights", "y")
    others: list[Path] = []
    receiver, sender = Pipe(duplex=False)
    child = get_context("spawn").Process(target=draft_and_wait, args=(home, location, sender))
    child.start()
    try:
        others.append(receiver.recv())
        mine = disk.draft(location)
        disk.sweep()
        assert others[0].exists() and mine.exists()
    finally:
        child.kill()
        child.join()
    disk.sweep()
    assert not others[0].exists() and mine.exists() and content(disk) == "one"


def draft_and_wait(home: Path, location: Location, made: Connection) -> None:
    made.send(Checkpoints(home).draft(location))
    time.sleep(60)


def test_a_draft_that_another_process_sweeps_as_it_is_made_is_made_anew(
    disk: Checkpoints, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, mkdir, swept = Checkpoints(home), Path.mkdir, 0

    def sweep(self: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal swept
        mkdir(self, *args, **kwargs)
        if self.name.startswith(".draft-") and swept < 3:
            swept += 1
            other.sweep()

    monkeypatch.setattr(Path, "mkdir", sweep)
    draft = disk.draft(WHERE)
    other.sweep()
    assert swept == 3 and draft.is_dir()


def test_a_draft_is_locked_while_it_is_swept(
    disk: Checkpoints, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, rmtree = home / "runs/run-1/weights/.draft-0", shutil.rmtree
    draft.mkdir(parents=True)

    def delete(folder: Path, **options: Any) -> None:
        lock = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", delete)
    disk.sweep()
    assert not draft.exists()


def test_where_folders_cannot_be_locked_an_old_draft_is_abandoned(
    disk: Checkpoints, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(lock: int, how: int) -> None:
        raise OSError(errno.EBADF, "as on some network file systems")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(disk)
    draft = home / "runs/run-1/weights/.draft-0"
    draft.mkdir()
    mine = disk.draft(Location("run-1", "weights", "z"))
    disk.sweep()
    assert draft.exists()
    for folder in (draft, mine):  # or the clock has jumped
        os.utime(folder, (0, 0))
    disk.sweep()
    assert not draft.exists() and mine.exists() and content(disk) == "one"


def test_a_checkpoint_can_be_moved(disk: Checkpoints, tmp_path: Path) -> None:
    shutil.move(str(write(disk).folder), tmp_path / "moved")
    info, folder = disk.open(str(tmp_path / "moved"))
    assert folder == tmp_path / "moved" and info.folder == str(folder)


def test_everything_is_flushed_before_it_is_renamed(
    disk: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    for part in (module, manifest):
        monkeypatch.setattr(part, "flush", lambda path: flushed.append(path.name))
    write(disk)
    assert flushed[:2] == [".manifest.json", "data"] and flushed[-1] == "weights"


def test_sweeps_count_the_bytes_that_they_free(disk: Checkpoints, clock: Clock, home: Path) -> None:
    kept = write(disk, "kept")
    old = write(disk, "a" * 100, location=Location("run-1", "weights", "old"), ttl_seconds=60)
    unread = write(disk, "b" * 50, location=Location("run-1", "weights", "b"), ttl_seconds=60)
    draft = home / "runs/run-2/weights/.draft-of-a-killed-process"
    draft.mkdir(parents=True)
    (draft / "part").write_text("c" * 25)
    clock.time += timedelta(seconds=61)
    assert disk.list() == [kept]  # whoever finds it first
    disk.sweep()
    assert disk.freed_bytes == old.size_bytes + unread.size_bytes + 25
    disk.delete(kept.path)
    disk.sweep()
    assert disk.freed_bytes == old.size_bytes + unread.size_bytes + 25  # not what users delete


def test_many_are_deleted_though_one_cannot_be(
    disk: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write(disk, location=Location("run-1", "weights", name)).path for name in "abc"]
    delete = disk.delete

    def refuse(path: str) -> None:
        if path == paths[1]:
            raise StorageError("deleting it failed.", hint="Mend the disk.")
        delete(path)

    monkeypatch.setattr(disk, "delete", refuse)
    assert disk.delete_all([*paths, PATH]) == [paths[0], paths[2]]
    assert [info.path for info in disk.list()] == [paths[1]]
    assert "deleting it failed" in caplog.text and caplog.text.count("not deleted") == 1
