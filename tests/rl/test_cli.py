"""The command `weaver-rl`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver_rl.cli import main
from weaver_rl.run_folder import open_run_folder

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = open_run_folder(tmp_path / "run", {"model": "weaver-nano"})
    assert main(["report", str(folder.path)]) == 0
    assert folder.report.exists()
    assert capsys.readouterr().out.strip() == str(folder.report)
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_selftest_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--list"]) == 0
    assert "importance sampling: " in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "weaver-rl report" in capsys.readouterr().out
    assert main(["nothing"]) == 2
    assert "weaver-rl selftest" in capsys.readouterr().err
