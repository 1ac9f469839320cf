"""The log in a server's home: bounded, filtered, followed over a rotation; what is not in it."""

from __future__ import annotations

import logging
import resource
import stat
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from weaver.server.database import open_database
from weaver.server.http import telemetry
from weaver.server.http.telemetry import JsonFormatter
from weaver.server.keys import Keys
from weaver.server.logs import FILE, LogFile, follow_log, read_log
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger("weaver.tests.log_file")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What `configure_logs` does is for the whole process: it is undone."""
    root, ours = logging.getLogger(), logging.getLogger("weaver")
    before = root.handlers[:], root.level, ours.level
    yield
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def write(home: Path, count: int, **bounds: int) -> LogFile:
    handler = LogFile(home, **bounds)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    try:
        for number in range(count):
            logger.log(logging.WARNING if number % 2 else logging.INFO, "line %d", number)
    finally:
        logger.removeHandler(handler)
    return handler


def test_it_is_bounded_and_read_over_its_files(home: Path) -> None:
    logger.setLevel(logging.INFO)
    write(home, 100, max_bytes=2000, older=3).close()
    files = list((home / FILE).parent.iterdir())
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 4 * 2200
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    lines = [line["message"] for line in read_log(home)]
    assert lines[-1] == "line 99" and 20 < len(lines) < 100
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers == list(range(numbers[0], 100))
    assert [line["message"] for line in read_log(home, last=2)] == ["line 98", "line 99"]
    assert {line["level"] for line in read_log(home, level="warning")} == {"WARNING"}
    assert not list(read_log(home, since=time.time() + 5))
    assert len(list(read_log(home, since=time.time() - 60))) == len(lines)


def test_it_is_followed_over_a_rotation_and_half_lines(home: Path) -> None:
    logger.setLevel(logging.INFO)
    handler = write(home, 3)
    followed = follow_log(home, level="warning")
    found: list[str] = []
    reader = threading.Thread(
        target=lambda: found.extend(line["message"] for line in islice(followed, 2))
    )
    reader.start()
    time.sleep(0.2)
    with (home / FILE).open("a") as file:
        file.write('{"level": "WARNING", "mess')
        file.flush()
        time.sleep(0.2)
        file.write('age": "in halves"}\n')
    handler.doRollover()
    logger.addHandler(handler)
    logger.warning("of the next file")
    logger.removeHandler(handler)
    handler.close()
    reader.join(10)
    assert found == ["in halves", "of the next file"]


def test_a_disk_that_is_full_is_said_once(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", False)  # others' files are full, too
    handler, limits = LogFile(home), resource.getrlimit(resource.RLIMIT_FSIZE)
    logger.addHandler(handler)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, limits[1]))
        logger.error("one")
        logger.error("two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        logger.removeHandler(handler)
        handler.close()
    said = capsys.readouterr().err
    assert said.count("cannot be written to") == 1 and "File too large" in said


def test_a_served_sample_leaves_neither_prompt_nor_key(home: Path) -> None:
    database = open_database(home)
    _, secret = Keys(database).create("p")
    database.dispose()
    telemetry.configure_logs(as_json=False, level="debug", home=home)
    settings = ServerSettings(home=home, port=0)
    with serving(FakeEngine(), settings) as server:
        headers = {"Authorization": f"Bearer {secret}"}
        for body in (
            {"model": "fake", "prompt": "zebra crossing", "max_tokens": 2},
            {"model": "fake", "prompt": "zebra crossing", "max_tokens": -2},
        ):
            httpx.post(f"{server.address}/v1/completions", json=body, headers=headers)
        httpx.get(f"{server.address}/v1/runs?key={secret}", headers=headers)
    lines = list(read_log(home))
    text = (home / FILE).read_text()
    assert "zebra" not in text and secret not in text
    sampled = [line for line in lines if line.get("operation") == "sample"]
    asked = [line for line in lines if line.get("path") == "/v1/completions"]
    assert [line["level"] for line in sampled] == ["DEBUG"]
    assert {line["status"]: line["level"] for line in asked} == {200: "DEBUG", 422: "INFO"}
