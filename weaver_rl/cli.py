"""The command `weaver-rl`: self-test, reports and comparisons of runs.

The self-test runs the learning proofs of `weaver_rl.proofs` here. Its page of their results is
written anew behind every run, so one that is ended early shows what it has.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import anyio

from weaver import AsyncServiceClient
from weaver.errors import ConfigError, WeaverError, nearest
from weaver_rl.comparison import compare
from weaver_rl.proofs import PROOFS, Outcome, Proof
from weaver_rl.report import make_page, write_report
from weaver_rl.run_folder import RunFolder
from weaver_rl.storage import encode, write_atomically

USAGE = """\
weaver-rl selftest [--help]   run the learning proofs, and write a page of their results
weaver-rl report FOLDER       write a run's report.html anew
weaver-rl compare FOLDER ...  runs side by side: a table, and a page of their curves
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: failed, and said why; 2: wrong arguments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["selftest"]:
            return selftest(words[1:])
        if words[:1] == ["compare"]:
            return comparison(words[1:])
        if words[:1] == ["report"] and len(words) == 2:
            sys.stdout.write(f"{write_report(RunFolder(Path(words[1])))}\n")
            return 0
    except WeaverError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    asked = words in (["--help"], ["-h"])
    (sys.stdout if asked else sys.stderr).write(USAGE)
    return 0 if asked else 2


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of a proof with one seed."""

    proof: str
    seed: int
    outcome: Outcome
    seconds: float


def chosen(names: Sequence[str], *, quick: bool = False) -> list[Proof]:
    """The proofs of these names (all of them for none); quick: with their first seed alone.

    Raises:
        ConfigError: no proof has that name; with the nearest.
    """
    known = {proof.name: proof for proof in PROOFS}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"no proof is called {name!r}.", field="proof", hint=nearest(name, known)
            )
    return [
        replace(proof, seeds=proof.seeds[: 1 if quick else None])
        for proof in PROOFS
        if not names or proof.name in names
    ]


async def run(wanted: Sequence[Proof], page: Path) -> list[Ran]:
    """Runs the proofs one after the other, printing a line for each and writing the page.

    A proof that ends with an error has failed; its words are on the page.
    """
    done: list[Ran] = []
    write_page(page, wanted, done)
    async with AsyncServiceClient() as service:
        for proof in wanted:
            for seed in proof.seeds:
                begin = time.monotonic()
                try:
                    outcome = await proof.run(service, seed)
                except WeaverError as error:
                    outcome = Outcome(value=float("nan"), passed=False, note=str(error))
                done.append(Ran(proof.name, seed, outcome, time.monotonic() - begin))
                write_page(page, wanted, done)
                verdict = "passed" if outcome.passed else "FAILED"
                note = f"  ({outcome.note})" if outcome.note else ""
                said = f"{proof.name}, seed {seed}: {outcome.value:.3f}{note}"
                sys.stdout.write(f"{verdict}  {said}  {done[-1].seconds:.0f} s\n")
                sys.stdout.flush()
    return done


def write_page(page: Path, wanted: Sequence[Proof], done: Sequence[Ran]) -> None:
    """Raises StorageError: the page cannot be written."""
    total = sum(len(proof.seeds) for proof in wanted)
    failed = sum(not one.outcome.passed for one in done)
    minutes = sum(one.seconds for one in done) / 60
    data = {
        "subtitle": f"Weaver {version('weaver-post-training')} · "
        f"Python {platform.python_version()} · {platform.system()} {platform.machine()} · "
        f"{datetime.now():%Y-%m-%d %H:%M}",
        "tiles": [
            ("Runs", f"{len(done)} of {total}"),
            ("Passed", str(len(done) - failed)),
            ("Failed", str(failed)),
            ("Minutes", f"{minutes:.1f}"),
        ],
        "proofs": [
            {
                "name": proof.name,
                "claim": proof.claim,
                "gate": proof.gate,
                "control": proof.control,
                "seeds": len(proof.seeds),
                "runs": [
                    {"seed": one.seed, "seconds": one.seconds, **asdict(one.outcome)}
                    for one in done
                    if one.proof == proof.name
                ],
            }
            for proof in wanted
        ],
        "footer": "Curves show the mean reward by step, for supervised fine-tuning the loss. "
        "The definitions are in weaver_rl/proofs.py; tests/learning runs the same.",
    }
    write_atomically(page, make_page("selftest", title="Self-test", data=data).encode())


def selftest(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: all passed; 1: not all; 2: wrong arguments."""
    parser = argparse.ArgumentParser("weaver-rl selftest", description="Run the learning proofs.")
    parser.add_argument("proof", nargs="*", help="names; all by default")
    parser.add_argument("--quick", action="store_true", help="one seed of each")
    parser.add_argument("--list", action="store_true", help="only show names and gates")
    parser.add_argument("--page", type=Path, default=Path("selftest.html"))
    options = parser.parse_args(arguments)
    try:
        wanted = chosen(options.proof, quick=options.quick)
    except ConfigError as error:
        parser.error(str(error))
    if options.list:
        sys.stdout.writelines(f"{proof.name}: {proof.gate}\n" for proof in wanted)
        return 0
    done = anyio.run(run, wanted, options.page)
    failed = [one for one in done if not one.outcome.passed]
    sys.stdout.write(f"{len(done) - len(failed)} of {len(done)} passed: {options.page.resolve()}\n")
    return 1 if failed else 0


def comparison(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: failed, or a folder was left out; 2: wrong arguments."""
    parser = argparse.ArgumentParser(
        "weaver-rl compare", description="Runs side by side; the first is compared with."
    )
    parser.add_argument("folder", nargs="+", help="of a run")
    parser.add_argument("--metric", action="append", default=[], help="in place of the main ones")
    parser.add_argument("--last", type=int, default=10, help="so many last values are averaged")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--page", type=Path, default=Path("comparison.html"))
    options = parser.parse_args(arguments)
    found = compare(options.folder, metrics=options.metric, window=options.last)
    page = found.write_page(options.page).resolve()
    if options.output == "json":
        text = encode({**found.as_json(), "page": str(page)}, indent=2).decode()
        sys.stdout.write(f"{text}\n")
    else:
        sys.stdout.write(f"{found}\n\n{page}\n")
    return 1 if found.left_out else 0
