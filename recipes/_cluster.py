"""`served`: a server of this machine whose gradients two ranks compute, for `demo --cluster`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from weaver.errors import ConfigError

FILE = """
address = "local"
[[trainer]]
model = "{model}"
ranks = 2
cpus = 0.5
"""
STOP_S = 60.0
"""In which both have ended."""
START_S = 180.0
"""In which the server and its Ray have started."""


@contextmanager
def served(model: str) -> Iterator[str]:
    """Its address, while it runs: `weaver serve --cluster`, in the home of this process's settings.

    Raises:
        ConfigError: it does not start; with its last words.
    """
    with TemporaryDirectory() as folder:
        file, log = Path(folder, "cluster.toml"), Path(folder, "log")
        file.write_text(FILE.format(model=model))
        options = ["--model", model] if model != "weaver-nano" else []
        options += ["--cluster", str(file), "--port", "0", "--no-auth"]
        program = "from weaver.cli import main; main()"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-c", program, "serve", *options], stderr=printed
            )
        try:
            end = time.monotonic() + START_S
            while "Weaver at " not in (said := log.read_text()):
                if process.poll() is not None or time.monotonic() > end:
                    words = " ".join(said.strip().splitlines()[-3:])
                    raise ConfigError(f"the server does not start: {words}", field="cluster")
                time.sleep(0.1)
            yield said.partition("Weaver at ")[2].split()[0]
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
