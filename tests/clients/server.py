"""A server in a process of its own, for clients of other projects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.templates import HERMES, nano_with

if TYPE_CHECKING:
    from collections.abc import Iterator

WEAVER = Path(sys.executable).with_name("weaver")
TOOLS = "weaver-nano-tools"
"""A model that is served beside the bundled one, whose chat template shows no tools."""


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[dict[str, str]]:
    """A server with keys; what clients of this project's have in their environment."""
    home, log = str(folder / "home"), folder / "log"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WEAVER_")}
    key = subprocess.run(
        [WEAVER, "keys", "create", "--project", "clients", "--home", home],
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    tools = f"{TOOLS}={nano_with(HERMES, folder / TOOLS)}"
    command = [WEAVER, "serve", "--port", "0", "--home", home, "--threads", "1", "--model", tools]
    command += options
    with log.open("w") as stderr, subprocess.Popen(command, env=plain, stderr=stderr) as process:
        while (address := re.search(r"Weaver at (\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        secret = re.search(r"wv-\S+", key)
        assert secret is not None
        try:
            yield {
                "PATH": os.environ["PATH"],
                "HOME": home,
                "WEAVER_BASE_URL": address[1],
                "WEAVER_API_KEY": secret[0],
            }
        finally:
            process.terminate()
    assert process.returncode == 0, log.read_text()
