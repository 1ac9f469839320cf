"""Measures what the service costs: `python -m tests.benchmarks [NAME ...] [--smoke] [--out FILE]`.

Without names it runs all, one after another. `--smoke` takes the smallest sizes, for seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.figures import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

BENCHMARKS = (
    "chats",
    "client",
    "cluster",
    "console",
    "fairness",
    "ray",
    "serve",
    "service",
    "softmax",
    "streams",
    "tinker",
)
"""Modules of this folder with a function `figures(smoke)`."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, for seconds")
    parser.add_argument("--out", type=Path, help="where the figures are written, as JSON")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.names} - {*BENCHMARKS}):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    result = {"machine": machine(), "benchmarks": {}}
    print(json.dumps(result["machine"]))
    for name in given.names or BENCHMARKS:
        print(f"\n== {name} (load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores)", flush=True)
        kept = result["benchmarks"][name] = []
        for figure in importlib.import_module(f"tests.benchmarks.{name}").figures(given.smoke):
            print(figure, flush=True)
            kept.append(figure.as_json())
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
