"""What a server is told before it loads anything: address, home, disk and keys."""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weaver.errors import ConfigError, ConflictError, WeaverError
from weaver.files import hold_lock, release_lock
from weaver.server.preflight import LIVE, check_home, check_start
from weaver.server.settings import ServerSettings

COMMAND = """
import sys
from weaver.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "uvicorn"} & set(sys.modules)))
"""


def start(home: Path, **settings: object) -> None:
    check_start(ServerSettings(**{"home": home, "port": 0, **settings}))  # type: ignore[arg-type]


def test_a_home_that_is_sound_is_left_as_it_was(home: Path) -> None:
    start(home)
    start(home)  # nothing is held behind it
    assert {path.name for path in home.iterdir()} <= {LIVE, "server.db"}


def test_a_home_of_another_server_is_named_with_its_process(home: Path) -> None:
    lock = hold_lock(home / LIVE, what="it", hint="")
    try:
        with pytest.raises(
            ConflictError, match=rf"{home} is in use .*process \d+ on .*WEAVER_HOME"
        ):
            start(home)
    finally:
        release_lock(lock)


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file"])
def test_a_home_that_cannot_be_written_is_named(place: str, home: Path) -> None:
    home.mkdir()
    (home / "a file").touch()
    with pytest.raises(ConfigError, match=rf"home: {home / place} cannot be written to: .*--home"):
        start(home / place)


def test_a_disk_without_room_is_named(home: Path) -> None:
    home.mkdir()
    least = shutil.disk_usage(home).total + 1
    with pytest.raises(ConfigError, match=rf"home: {home} is on a disk with \d+ MB left. Free"):
        check_home(home, least_bytes=least)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        with pytest.raises(ConfigError, match="cannot be written to: File too large"):
            check_home(home)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_keys_off_for_others_and_a_wrong_database_are_named(home: Path) -> None:
    with pytest.raises(ConfigError, match="keys are off"):
        start(home, host="0.0.0.0", auth=False)
    with pytest.raises(WeaverError, match="database_url"):
        start(home, database_url="nothing://at-all")


def test_a_taken_port_ends_the_command_before_anything_heavy_is_imported(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [f"--port={taken.getsockname()[1]}", f"--home={home}"]
        began = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", COMMAND, "serve", *options], capture_output=True, text=True
        )
    assert time.monotonic() - began < 10  # torch alone takes longer on a slow machine
    assert ended.returncode == 1 and ended.stdout == "[]\n"
    assert ended.stderr.startswith("error: port: cannot listen on 127.0.0.1:")
    assert ended.stderr.count("\n") == 1
