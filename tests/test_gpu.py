"""`make gpu` where there is no GPU: everything is skipped by name, and the table says so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.gpu.__main__ import ELSEWHERE, ROOT, suites_of, table

PASSED = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_sheet" name="test_a" time="1.5">
<properties><property name="bf16 gap" value="0.01 nats"/></properties></testcase>
<testcase classname="tests.gpu.test_sheet" name="test_b" time="0"><failure/></testcase>
<testcase classname="" name="tests.engine.test_adapters" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_without_a_gpu_all_is_skipped_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.gpu",
            "--json",
            tmp_path / "t.json",
            "tests/engine/test_linear.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch finds no CUDA device; all is skipped" in done.stdout
    suites = json.loads((tmp_path / "t.json").read_text())["suites"]
    (suite,) = suites.values()
    assert suite["passed"] == suite["failed"] == 0 < suite["skipped"]
    assert done.stdout.count("skipped: needs a CUDA device") == 2


def test_the_table_has_what_passed_failed_and_was_measured(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(PASSED)
    lines = table(suites_of(report)).splitlines()
    assert "| gpu.test_sheet | 1 | 1 | 0 | 2 |" in lines
    assert "| engine.test_adapters | 0 | 0 | 1 | 0 |" in lines
    assert "| bf16 gap | 0.01 nats |" in lines


def test_the_tests_of_the_engine_take_what_may_be_missing_from_one_place() -> None:
    named = re.compile(r"^(?:from|import) (?:peft|hypothesis|httpx|zstandard|sqlalchemy)", re.M)
    files = (ROOT / "tests" / "engine").glob("*.py")
    assert [path.name for path in files if named.search(path.read_text())] == []


def test_modules_that_are_left_out_are_there() -> None:
    assert all((ROOT / "tests" / "engine" / f"{name}.py").exists() for name in ELSEWHERE)
