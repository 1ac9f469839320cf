"""`weaver models download`: the hub's own client, against a hub of this test on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tests.cli.test_commands import weaver
from weaver.engine.torch.catalog import NANO
from weaver.errors import InvalidNameError, ServiceConnectionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0" * 40
DOWNLOAD = [sys.executable, "-c", "from weaver.cli import main; main()", "models", "download"]


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model, `tiny/nano`; its address, and the files that were asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(body=False)

        def do_GET(self) -> None:
            self.reply(body=True)

        def reply(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            name = path.rsplit("/", 1)[-1]
            content, status = b"", 200
            if path == "/":
                pass
            elif not path.removeprefix("/api/models").startswith("/tiny/nano/"):
                status = 404
            elif "/tree/" in path:
                content = json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": _sha(data)}
                        for name, data in files.items()
                    ]
                ).encode()
            elif path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in files]
                content = json.dumps(
                    {"id": "tiny/nano", "sha": COMMIT, "siblings": siblings}
                ).encode()
            elif "/resolve/" in path and name in files:
                content = files[name]
                asked.extend([name] if body else [])
            else:
                status = 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{_sha(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                missing = "EntryNotFound" if "/tiny/nano/" in path else "RepoNotFound"
                self.send_header("X-Error-Code", missing)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _sha(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def fetch(home: Path, endpoint: str, name: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [*DOWNLOAD, name], capture_output=True, text=True, env=environment, timeout=100
    )


def test_a_model_is_fetched_without_pickles_and_code(tmp_path: Path) -> None:
    files = {f.name: f.read_bytes() for f in NANO.iterdir() if f.is_file()}
    unwanted = {"pytorch_model.bin": b"pickle", "modeling.py": b"code"}
    with hub({**files, **unwanted}) as (endpoint, asked):
        done = fetch(tmp_path, endpoint, "tiny/nano")
        assert done.returncode == 0, done.stderr
        assert "tiny/nano (Qwen3ForCausalLM, 272,096 parameters) is in " in done.stdout
        missing = fetch(tmp_path, endpoint, "tiny/none")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(asked)
    assert not set(asked) & unwanted.keys()
    [weights] = tmp_path.glob("hub/models--tiny--nano/snapshots/*/model.safetensors")
    assert weights.read_bytes() == files["model.safetensors"]
    assert missing.returncode == 1 and "'tiny/none': cannot be read or fetched" in missing.stderr


def test_without_a_hub_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ServiceConnectionError, match=r"127\.0\.0\.1:1: it cannot be reached"):
        weaver("models", "download", "tiny/nano")
    with pytest.raises(InvalidNameError, match="owner/name"):
        weaver("models", "download", "nano")
