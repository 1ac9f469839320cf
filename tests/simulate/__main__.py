"""Simulates the day and its comparisons, side by side, and writes docs/simulation.md.

python -m tests.simulate                       # eight minutes on two cores
python -m tests.simulate --tenants 50 --hours 1 --out /tmp/page.md
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.simulate.contention import contention
from tests.simulate.figures import Figures, figures_of
from tests.simulate.page import PAGE, page
from tests.simulate.tenants import Load
from tests.simulate.world import Case, simulate

if TYPE_CHECKING:
    from collections.abc import Mapping

KEPT = Path(__file__).parents[2] / ".bench" / "simulation.pickle"
GROWTH = (1, 2, 4)
"""Times the load, and the devices."""
PEAK_HOURS, PEAK_AT = 1.0, 14.0


def cases(tenants: int, hours: float, seed: int) -> dict[str, Case]:
    """The longest first."""
    deaths = max(2, int(40 * hours / 24)), max(1, int(8 * hours / 24))
    day = Case(
        load=Load(tenants=tenants, hours=hours),
        sampler_deaths=deaths[0],
        group_deaths=deaths[1],
        seed=seed,
    )
    hours = min(PEAK_HOURS, hours)
    peak = replace(
        day,
        load=replace(day.load, hours=hours, begins_at=PEAK_AT),
        joining=0,
        sampler_deaths=0,
        group_deaths=0,
    )
    grown = {
        f"x{n}": replace(
            peak,
            load=replace(peak.load, tenants=n * tenants),
            groups=n * day.groups,
            samplers=n * day.samplers,
        )
        for n in reversed(GROWTH)
    }
    return {"day": day, **grown, "hashed": replace(peak, hashed=True)}


def figures(case: Case) -> Figures:
    logging.disable(logging.WARNING)
    return figures_of(simulate(case))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulate")
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    wanted = cases(given.tenants, given.hours, given.seed)
    if not given.again:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_bytes(pickle.dumps(_all(wanted)))
    found, contended = pickle.loads(KEPT.read_bytes())
    given.out.write_text(page(wanted["day"], found, contended))


def _all(wanted: dict[str, Case]) -> tuple[dict[str, Figures], list[Mapping[str, float]]]:
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        running = {name: pool.submit(figures, case) for name, case in wanted.items()}
        found = {}
        for name, future in running.items():
            found[name] = future.result()
            sys.stderr.write(f"{name}: {found[name].cpu_s:.0f} s of processor time\n")
    sizes = {f"{2**i},000 tokens": (1, 2**i) for i in range(8)}
    runs = {"16 runs": (16, 64)} | {f"one run, {i}": (1, 64) for i in range(7)}
    return found, [contention(one, seconds=3600) for one in (sizes, runs)]


if __name__ == "__main__":
    main()
