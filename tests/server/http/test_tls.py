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
import httpx
import pytest

from weaver.client.http import HttpService
from weaver.errors import ServiceConnectionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


NAMES = "DNS:localhost,IP:127.0.0.1"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `key` and `cert`, for localhost and 127.0.0.1, signed by itself."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def make_certificate(folder: Path, *, names: str = NAMES, days: int = 2) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    asked = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=it", "-addext"]
    _openssl(folder, *asked, f"subjectAltName={names}", "-keyout", "key", "-out", "asked")
    signed = ["x509", "-req", "-in", "asked", "-signkey", "key", "-copy_extensions", "copy"]
    _openssl(folder, *signed, "-days", str(days), "-out", "cert")
    return folder


def _openssl(folder: Path, *arguments: str) -> str:
    command = ["openssl", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


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


async def test_a_folder_of_authorities_counts_too(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _openssl(certificate, "x509", "-in", "cert", "-noout", "-hash").strip()
    shutil.copy(certificate / "cert", tmp_path / f"{name}.0")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with serving(certificate) as port:
        async with HttpService(f"https://localhost:{port}") as service:
            with anyio.fail_after(10):
                assert await service.list_models() == []


async def fails(address: str, message: str, hint: str) -> None:
    """Every call raises that at once, where it would wait 300 s for a server to come back."""
    async with HttpService(address) as service:
        with anyio.fail_after(10), pytest.raises(ServiceConnectionError, match=message) as caught:
            await service.list_models()
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("trusted", [None, "SSL_CERT_DIR"])
async def test_an_unknown_authority_is_told_at_once(
    certificate: Path, trusted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusted is not None:
        monkeypatch.setenv(trusted, str(tmp_path))  # which does not have it
    with serving(certificate) as port:
        await fails(f"https://localhost:{port}", "self-signed", "SSL_CERT_FILE")
        await fails(f"https://localhost:{port}", "self-signed", "SSL_CERT_DIR")


@pytest.mark.parametrize(
    ("names", "days", "message", "hint"),
    [
        ("DNS:other.example", 2, "not valid for 'localhost'", "for another name"),
        ("IP:127.0.0.1", 2, "not valid for 'localhost'", "for another name"),
        (NAMES, -1, "has expired", "renew it at the server"),
    ],
)
async def test_a_certificate_that_does_not_hold_is_told_at_once(
    names: str,
    days: int,
    message: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate = make_certificate(tmp_path, names=names, days=days)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    with serving(certificate) as port:
        await fails(f"https://localhost:{port}", message, hint)


async def test_a_certificate_for_another_address_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, names="DNS:localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    with serving(certificate) as port:
        await fails(f"https://127.0.0.1:{port}", "not valid for '127.0.0.1'", "for another name")


async def test_a_server_without_tls_is_told_at_once() -> None:
    with serving(None) as port:
        await fails(f"https://localhost:{port}", "SSL", "speaks no TLS")


async def test_a_fault_that_the_caller_handles_is_not_the_next_servers() -> None:
    attempts = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise httpx.ConnectError("a moment away")
        return httpx.Response(200, json=[])

    with serving(None) as port:
        async with HttpService(f"https://localhost:{port}") as service:
            try:
                await service.list_models()
            except ServiceConnectionError:
                transport = httpx.MockTransport(answer)
                async with HttpService("http://localhost", transport=transport) as other:
                    assert await other.list_models() == []
    assert attempts == 2


async def test_a_file_of_authorities_that_is_not_there_is_told_when_the_service_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
    with pytest.raises(ServiceConnectionError, match="SSL_CERT_FILE"):
        HttpService("https://localhost")
