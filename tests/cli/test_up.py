"""`weaver up` and `weaver logs`: a key once, lines to paste that work, and what the server said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.cli.test_commands import weaver
from tests.cli.test_serve import WEAVER
from weaver.cli import main
from weaver.cli.up import _tell
from weaver.config import command
from weaver.errors import InvalidNameError, NotFoundError
from weaver.server.logs import FILE
from weaver.server.serve import Running
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "export WEAVER_BASE_URL=http://127.0.0.1:8000"
REST = """\
export OPENAI_BASE_URL=$WEAVER_BASE_URL/v1 OPENAI_API_KEY=$WEAVER_API_KEY
export TINKER_BASE_URL=$WEAVER_BASE_URL TINKER_API_KEY=tml-$WEAVER_API_KEY
"""
RUNNING = Running("http://127.0.0.1:8000", stop=lambda: None)


def test_a_key_is_made_once_and_anew_only_when_it_was_revoked(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ServerSettings(home=home)
    _tell(settings, "team", RUNNING)
    first = capsys.readouterr()
    assert first.out.startswith(f"{HEAD} WEAVER_API_KEY=wv-") and first.out.endswith(REST)
    for _ in range(3):
        _tell(settings, "team", RUNNING)
    again = capsys.readouterr()
    assert again.out == 3 * f"{HEAD}\n{REST}"
    assert f"`weaver keys create --project team --home {home}` makes another" in again.err
    [key] = json.loads(weaver("keys", "list", "--home", str(home), "-o", "json"))
    assert (key["project"], key["name"], key["admin"]) == ("team", "up", False)
    weaver("keys", "revoke", key["id"], "--home", str(home))
    _tell(settings, "team", RUNNING)
    assert "WEAVER_API_KEY=wv-" in capsys.readouterr().out
    _tell(ServerSettings(home=home, auth=False), "team", RUNNING)
    assert "WEAVER_API_KEY=none" in capsys.readouterr().out
    assert len(json.loads(weaver("keys", "list", "--home", str(home), "-o", "json"))) == 2


def test_a_home_is_named_where_it_is_not_the_default(home: Path) -> None:
    from pathlib import Path

    assert command("weaver logs", Path("~/.weaver")) == "weaver logs"
    assert command("weaver logs", Path("~/.weaver").expanduser()) == "weaver logs"
    assert command("weaver logs", Path("/a b")) == "weaver logs --home '/a b'"
    listed = weaver("keys", "list", "--home", str(home))
    assert listed == f"No keys; `weaver keys create --project NAME --home {home}` makes one.\n"
    with pytest.raises(NotFoundError, match=f"weaver keys list --home {home}"):
        weaver("keys", "revoke", "0000", "--home", str(home))
    with pytest.raises(NotFoundError, match=f"`weaver serve --home {home}` writes it"):
        weaver("logs", "--home", str(home))
    with pytest.raises(InvalidNameError, match="project: is 'a b'"):
        weaver("up", "--project", "a b", "--home", str(home))


LINES = [
    ("2026-01-02T03:04:05+0000", "INFO", "serving"),
    ("2026-01-02T03:04:06+0000", "DEBUG", "sample 1: done"),
    ("2026-01-02T03:04:07+0000", "ERROR", "two\nlines \x1b[2J"),
]
GOLDEN = """\
2026-01-02 03:04:05 INFO    weaver.server [-] serving
2026-01-02 03:04:06 DEBUG   weaver.server [-] sample 1: done
2026-01-02 03:04:07 ERROR   weaver.server [-] two·lines ·[2J
"""


def test_a_log_is_printed_filtered_and_escaped(home: Path) -> None:
    (home / FILE).parent.mkdir(parents=True)
    names = ("time", "level", "message")
    rows = [
        {**dict(zip(names, row, strict=True)), "logger": "weaver.server", "request_id": "-"}
        for row in LINES
    ]
    (home / FILE).write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "half a li")
    where = ("logs", "--home", str(home))
    assert weaver(*where) == GOLDEN
    assert weaver(*where, "-n", "1") == GOLDEN.splitlines(keepends=True)[2]
    assert weaver(*where, "--level", "info", "-n", "2").count("\n") == 2
    assert "sample" not in weaver(*where, "-l", "info")
    assert weaver(*where, "--since", "7d") == ""
    assert json.loads(weaver(*where, "-n", "1", "-o", "json")) == rows[2]
    assert weaver(*where, "-o", "tsv").splitlines()[0].split("\t")[1] == "INFO"


@pytest.mark.slow
def test_up_serves_with_lines_that_work(home: Path) -> None:
    command = [*WEAVER, "up", "--port=0", f"--home={home}", "--log-level=debug"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        listed = subprocess.run(
            ["bash", "-c", f"{lines[0]} {sys.executable} -c '{WEAVER[2]}' models list -o tsv"],
            capture_output=True,
            text=True,
        )
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    assert "weaver-nano" in listed.stdout, listed.stderr
    assert lines[0].split("=")[-1].strip() not in (home / FILE).read_text()
    assert "GET /v1/base-models 200" in weaver("logs", "--home", str(home))


def test_the_level_is_for_all_commands(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import logging, sys
from weaver.cli import main
sys.argv = ["weaver", "--log-level", "debug", "keys", "list"]
try:
    main()
except SystemExit:
    print(logging.getLogger("weaver.a").isEnabledFor(10), logging.getLogger().level)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.endswith("True 20\n"), ended.stderr
    monkeypatch.setattr(sys, "argv", ["weaver", "--log-level", "loud", "keys", "list"])
    with pytest.raises(SystemExit):
        main()
    assert "'loud'" in capsys.readouterr().err
