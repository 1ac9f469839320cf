"""What is refused before a request has been read: heads without end."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver.server.serve import MAX_HEAD_BYTES
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    settings = ServerSettings(home=home, port=0, auth=False)
    with serving(FakeEngine(), settings) as server:
        yield server.address


HEAD = b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (HEAD, b"X-One-Of-Many: 1234567890123456789012345678901234567890\r\n"),
        (HEAD + b"X-Long: ", b"a" * 50),
        (b"GET /", b"a" * 50),
        (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-Trailer: 12345678901234567890123456789012345\r\n"),
        (CHUNKED + b"2;", b"extension=1234567890123456789012345678901234567890"),
    ],
    ids=["fields", "one field", "path", "trailers", "chunk extension"],
)
def test_a_head_without_end_is_refused(address: str, start: bytes, again: bytes) -> None:
    at = urlsplit(address)
    with socket.create_connection((at.hostname, at.port), timeout=20) as connection:
        sent = 0
        with pytest.raises(ConnectionError):  # far above what a kernel holds on the way
            connection.sendall(start)
            while sent < 2**26:
                connection.sendall(again * 1000)
                sent += len(again) * 1000
        assert sent < 2**25
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_head_of_usual_length_and_a_long_body_are_read(address: str) -> None:
    with httpx.Client(base_url=address) as http:
        for _ in range(3):  # on one connection
            fields = {"X-Padding": "a" * (MAX_HEAD_BYTES - 2000)}
            assert http.get("/v1/runs", headers=fields).status_code == 200
            body, kind = "{}" + " " * 2**20, {"Content-Type": "application/json"}
            assert http.post("/v1/sessions", content=body, headers=kind).status_code == 201
            pieces = (part.encode() for part in ['{"user_', 'metadata": {}}', *[" "] * 9000])
            answer = http.post("/v1/sessions", content=pieces, headers=kind)
            assert answer.status_code == 201
