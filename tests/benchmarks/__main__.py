"""`make bench`: runs every benchmark and prints ratios, beside what else the machine was doing."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

from tests import benchmarks


def main(names: list[str]) -> None:
    found = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    for name in names or [n for n in found if not n.startswith("_")]:
        load = os.getloadavg()[0]
        print(f"\n== {name} (load {load:.2f} on {os.cpu_count()} cores)", flush=True)
        importlib.import_module(f"tests.benchmarks.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
