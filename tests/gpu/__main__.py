"""`make gpu`: the engine's tests on a CUDA device, the measurements there, and one table of both.

Needs torch, transformers, safetensors, pydantic, anyio, numpy and pytest; what needs more is
skipped by name, and so is everything where torch finds no CUDA device. `--device cpu` runs the
same suites on the CPU, to see that they are sound before a GPU is rented. The benchmark is that of
`make bench`, at the shapes of a 0.6B and an 8B model, against the peers that are installed; with
`--no-tests` nothing else runs, with `--shapes ''` it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "transformers", "safetensors", "pydantic", "anyio", "numpy", "pytest")
ELSEWHERE = {
    "test_fake": "the engine that other tests have in place of this one",
    "test_out_of_memory": "counts what a service counts",
    "test_prompts": "asks a service",
    "test_softmax": "starts processes of its own that use the CPU",
    "test_threaded": "asks a service",
}
"""Modules of tests/engine that are left out, and why: what they test doesn't depend on a device."""
SUITES = ["tests/engine"]
FOR_BENCHMARKS = ("httpx", "sqlalchemy", "zstandard")
"""What the embedded client that is measured needs beside."""


@dataclass
class Suite:
    """What became of the tests of one module."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    measured: dict[str, str] = field(default_factory=dict)
    """What its tests recorded: names and values with their units."""


def main(arguments: list[str]) -> int:
    """Runs all of it and prints the table; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--device", default=os.environ.get("WEAVER_TEST_DEVICE", "cuda"))
    parser.add_argument("--json", type=Path, help="also writes the table there")
    parser.add_argument("--shapes", default="0.6b,8b", help="of the models that are measured")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("tests", nargs="*", default=SUITES, help="files and folders of tests")
    options = parser.parse_args(arguments)
    missing = [package for package in NEEDED if not find_spec(package)]
    if missing:
        print(f"make gpu needs {', '.join(missing)}: pip install {' '.join(missing)}")
        return 2
    machine = machine_of(options.device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    status, suites = 0, {}
    if not options.no_tests:
        status, suites = run_tests(options.device, options.tests)
        print(table(suites), flush=True)
    for shape in filter(None, options.shapes.split(",")):
        status = run_benchmark(options.device, shape) or status
    if options.json:
        report = {"machine": machine, "suites": {name: vars(s) for name, s in suites.items()}}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return status


def machine_of(device: str) -> dict[str, str]:
    """What the numbers were made with."""
    import torch
    import transformers

    known = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
    if not device.startswith("cuda"):
        return known
    if not torch.cuda.is_available():
        return known | {"device": f"{device}: torch finds no CUDA device; all is skipped"}
    properties = torch.cuda.get_device_properties(device)
    return known | {
        "device": properties.name,
        "memory": f"{properties.total_memory / 1e9:.1f} GB",
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
    }


def run_tests(device: str, tests: list[str]) -> tuple[int, dict[str, Suite]]:
    """pytest's exit status, and what became of each module's tests, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", "."]
        command += ["--confcutdir", ".", "--continue-on-collection-errors"]
        command += [f"--ignore=tests/engine/{name}.py" for name in ELSEWHERE]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *tests],
            cwd=ROOT,
            env={**os.environ, "WEAVER_TEST_DEVICE": device},
        )
        return done.returncode, suites_of(report) if report.exists() else {}


def run_benchmark(device: str, shape: str) -> int:
    """Prints the cases of a shape as they are measured; the exit status."""
    import torch

    missing = [package for package in FOR_BENCHMARKS if not find_spec(package)]
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        missing = ["a CUDA device"]
    print(f"\nbenchmark, shape {shape}", flush=True)
    if missing:
        print(f"skipped: needs {', '.join(missing)}")
        return 0
    module = "tests.benchmarks.peers.run"
    done = subprocess.run(
        [sys.executable, "-m", module, "--shape", shape, "--no-growth"],
        cwd=ROOT,
        env={**os.environ, "WEAVER_TEST_DEVICE": device},
    )
    return done.returncode


def suites_of(report: Path) -> dict[str, Suite]:
    """By module, from pytest's report in JUnit's form."""
    suites: dict[str, Suite] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname") or case.get("name", "")  # the latter of one left out whole
        suite = suites.setdefault(module.removeprefix("tests."), Suite())
        suite.seconds += float(case.get("time", 0))
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            suite.failed += 1
        elif "skipped" in kinds:
            suite.skipped += 1
        else:
            suite.passed += 1
        for each in case.iter("property"):
            suite.measured[each.get("name", "")] = each.get("value", "")
    return suites


def table(suites: dict[str, Suite]) -> str:
    """A row for each module, and one for each value that was measured."""
    lines = ["", "| suite | passed | failed | skipped | s |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {s.passed} | {s.failed} | {s.skipped} | {s.seconds:.0f} |"
        for name, s in sorted(suites.items())
    ]
    lines += [f"| {name} | skipped: {why} | | | |" for name, why in ELSEWHERE.items()]
    measured = [item for _, s in sorted(suites.items()) for item in s.measured.items()]
    if measured:
        lines += ["", "| measured | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in measured]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
