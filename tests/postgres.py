"""A PostgreSQL of the tests' own, which may be stopped and started; the fixture is in conftest."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from weaver.server.database import open_database
from weaver.server.tables import metadata


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, if it is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Postgres:
    """Listens on a socket in a folder of its own. It does not wait for the disk."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="postgres"))
        self._as_user = {}
        if os.geteuid() == 0:  # it refuses to be run by root
            shutil.chown(self._folder, "postgres", "postgres")
            self._as_user = {"user": "postgres", "group": "postgres", "extra_groups": ()}
        self._run("initdb", "--auth=trust", "--username=weaver", "--no-sync")
        self.start()

    def emptied(self) -> str:
        """Its address, after all tables were dropped."""
        url = f"postgresql:///postgres?user=weaver&host={self._folder}"
        database = open_database(self._folder, url)
        metadata.drop_all(database)
        database.dispose()
        return url

    def start(self) -> None:
        options = f"-c listen_addresses= -c fsync=off -k {self._folder}"
        self._run("pg_ctl", "-s", "-w", "-o", options, "-l", f"{self._folder}/log", "start")

    def stop(self) -> None:
        """As a crash does."""
        self._run("pg_ctl", "-s", "-m", "immediate", "stop")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, "-D", self._folder / "data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._as_user)  # type: ignore[call-overload]
