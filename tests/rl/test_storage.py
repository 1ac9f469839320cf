"""Storage: a kill or a full disk at any moment leaves the old content or the new, never a part."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from weaver.errors import StorageError
from weaver_rl.storage import append_line, plain, read_lines, write_atomically


def test_a_full_disk_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/a"):
        write_atomically(tmp_path / "file" / "a.json", b"")
    with pytest.raises(StorageError, match="file/b"):
        append_line(tmp_path / "file" / "b.jsonl", {})


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    link, file, pipe = tmp_path / "link", tmp_path / "shared" / "a", tmp_path / "pipe"
    file.parent.mkdir()
    link.symlink_to(file)
    for words in (b"old", b"new"):
        write_atomically(link, words)
        assert link.is_symlink() and file.read_bytes() == words
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, b"words")
        assert pipe.is_fifo() and os.read(reader, 9) == b"words"
    finally:
        os.close(reader)
    with pytest.raises(StorageError, match="Is a directory"):
        write_atomically(tmp_path / "shared", b"")
    assert {each.name for each in tmp_path.iterdir()} == {"link", "shared", "pipe"}


def test_kill_while_writing_never_shows_a_part(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    script = """
        import itertools, sys
        from pathlib import Path
        from weaver_rl.storage import write_atomically
        for i in itertools.count():
            write_atomically(Path(sys.argv[1]), (str(i % 10) * 50_000).encode())
            if i == 3:
                sys.stdout.write("ready"); sys.stdout.flush()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(5)
        process.kill()
    content = file.read_bytes()
    assert len(content) == 50_000
    assert len(set(content)) == 1


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    assert read_lines(log) == []
    append_line(log, {"step": 1})
    append_line(log, {"step": 2})
    whole = log.read_bytes()
    for end in range(9 + 4, len(whole)):
        log.write_bytes(whole[:end])
        assert read_lines(log) == [{"step": 1}]
    log.write_bytes(whole)
    assert read_lines(log) == [{"step": 1}, {"step": 2}]


def test_a_line_after_a_torn_one_is_not_lost_in_it(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    log.write_bytes(b'{"step": 1}\n{"st')
    append_line(log, {"step": 2})
    assert read_lines(log) == [{"step": 1}, {"step": 2}]


def test_everything_becomes_json() -> None:
    value = {"a": np.float32(0.5), "b": (np.arange(2), None), 3: float("nan"), "p": Path("x")}
    assert plain(value) == {"a": 0.5, "b": [[0, 1], None], "3": None, "p": "x"}
