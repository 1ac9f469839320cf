"""A server behind a proxy that speaks TLS, with a certificate of one's own authority."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import anyio
import pytest

from weaver.client.http import HttpService
from weaver.errors import ServiceConnectionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `key` and `cert`, for localhost and 127.0.0.1, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "cert")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *files, *names], check=True, capture_output=True)
    return folder


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(certificate: Path | None) -> Iterator[int]:
    """The port of a server that has no models; without a certificate it speaks no TLS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "cert", certificate / "key")
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_an_authority_of_the_environment_counts_on_loopback(
    host: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serving(certificate) as port:
        async with HttpService(f"https://{host}:{port}") as service:
            with anyio.fail_after(10):
                assert await service.list_models() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_faults_of_tls_say_what_to_do_at_once(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(address: str, hint: str) -> None:
        async with HttpService(address) as service:
            with anyio.fail_after(10), pytest.raises(ServiceConnectionError, match=hint):
                await service.list_models()  # which would wait for 300 s

    with serving(certificate) as port, serving(None) as plain:
        await fails(f"https://localhost:{port}", "SSL_CERT_FILE")
        await fails(f"https://localhost:{plain}", "speaks no TLS")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "nothing"))
    with pytest.raises(ServiceConnectionError, match="SSL_CERT_FILE"):
        HttpService("https://localhost")
