"""Writes docs/benchmarks.md from what was measured, so that no figure is typed by hand.

    python -m tests.benchmarks.peers.page [FILE ...]

A file is one of `tests.benchmarks.peers.run` or of `tests.benchmarks --out`; each machine is judged
by itself. What people wrote under the page's last heading, "Notes", stays.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers.cases import Case, cases_of
from tests.benchmarks.peers.shapes import FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"
VERDICTS = {None: "", True: "reached", False: "**missed**"}
NOTES = "## Notes\n"
HEAD = """# Benchmarks

Written by `python -m tests.benchmarks.peers.page` from what `make bench` has measured, but for the
notes at its end. Whole processes run in turns (ABAB...), each through its public API, by wall time
on all cores, in float32 on a CPU and bfloat16 on CUDA; a figure is the median, with the least and
the most in brackets, and what counts is the ratio: processors differ by a factor of three. The
model is a Qwen3 of 60 M parameters (hidden 512, 8 layers, vocabulary 32,000) with random weights
and LoRA rank 32, unless a case says otherwise. Peers are installed in environments of their own, at
their defaults; `generate` gets batches of 32, each as long as its longest row.

`make bench` measures it anew, in half an hour on two cores, and
`make bench ARGS='--only "2 x 64" --rounds 9'` one case more thoroughly; what is in
`.bench/results.json` already is not measured again. `--shape 0.6b` and `--shape 8b` take larger
models. With `WEAVER_TEST_DEVICE=cuda` both sides compute on the GPU.
"""


def page(results: Sequence[dict[str, Any]], notes: str = "") -> str:
    parts = [HEAD]
    for result in results:
        parts.append(_machine(result))
        parts += [_service(result)] if "benchmarks" in result else [_table(result), _growth(result)]
    return "\n".join([*parts, NOTES]) + notes


def _machine(result: dict[str, Any]) -> str:
    machine, limits = result["machine"], result.get("limits")
    flags = ", ".join(machine["flags"]) or "none of AVX2, AVX-512 and AMX"
    what = "The service" if "benchmarks" in result else "Against peers"
    if result.get("shape"):
        what += f", shape {result['shape']}"
    if result.get("smoke"):
        what += ", a smoke run that says nothing"
    device = f"{machine['device']} beside " if machine.get("device") else ""
    torch = f", torch {machine['torch']}" if "torch" in machine else ""
    text = (
        f"## {what}: {device}{machine['processor']}, {machine['cores']} cores\n\n"
        f"{flags}; {machine['memory_gb']:.0f} GB, Python {machine['python']}{torch}, load "
        f"{machine['load']} before.\n"
    )
    if not limits:
        return text
    text += (
        f"\nIts limits: {limits['train_tokens_per_s']:.0f} tokens/s of training by matrix products "
        f"alone; {limits['bandwidth_gb_per_s']:.1f} GB/s of reading, which is "
        f"{limits['decode_tokens_per_s']:.0f} tokens/s of one row.\n\n"
        "| x Wᵀ, GFLOP/s | plain | prepacked |\n|---|---|---|\n"
    )
    for name, speeds in limits["gemm_gflops"].items():
        shown = [f"{speeds[kind]:.3g}" if kind in speeds else "" for kind in ("plain", "prepacked")]
        text += f"| {name} | {' | '.join(shown)} |\n"
    return text


def _service(result: dict[str, Any]) -> str:
    rows = ["| | measured | bound | |", "|---|---|---|---|"]
    for name, figures in result["benchmarks"].items():
        for one in figures:
            spread = f" ({one['low']:.4g}-{one['high']:.4g})" if one["rounds"] > 1 else ""
            bounds = {"at most": one["at_most"], "at least": one["at_least"]}
            bound = "".join(f"{word} {n:g}" for word, n in bounds.items() if n is not None)
            measured = f"{one['median']:.4g} {one['unit']}{spread}"
            rows.append(
                f"| {name}: {one['name']} | {measured} | {bound} | {VERDICTS[one['reached']]} |"
            )
    return "\n".join(rows) + "\n"


def _table(result: dict[str, Any]) -> str:
    rows = ["| case | ours | theirs | ratio | to reach | |", "|---|---|---|---|---|---|"]
    for case in cases_of(result["machine"]["device"]):
        measured = result["cases"].get(case.name)
        if measured is None:
            continue
        if "error" in measured:
            rows.append(
                f"| {case.name} | | | | {_goal(case)} | not measured: {measured['error'][:80]} |"
            )
            continue
        rows.append(_row(case, measured, result.get("limits")))
    return "\n".join(rows) + "\n"


def _row(case: Case, measured: dict[str, Any], limits: dict[str, Any] | None) -> str:
    verdicts, shown = [], []
    ours, *theirs = [_figure(case, measured, at) for at, s in enumerate(measured["seconds"]) if s]
    if "ratio" in measured:
        shown.append(f"{measured['ratio']:.2f}")
        verdicts += [measured["ratio"] >= case.ratio] if case.ratio else []
    if case.memory and "memory_ratio" in measured:
        shown.append(f"{measured['memory_ratio']:.2f} of memory")
        verdicts.append(measured["memory_ratio"] >= case.memory)
    if case.share and limits:
        share = measured["tokens_per_s"] / _limit(case, limits)
        shown.append(f"{share:.0%} of the limit")
        verdicts.append(share >= case.share)
    if case.most_ms:
        verdicts.append(1000 * measured["median_s"][0] <= case.most_ms)
    verdict = VERDICTS[all(verdicts) if verdicts else None]
    failed = f"not measured: {measured['peer_error'][:80]}" if "peer_error" in measured else ""
    peer = theirs[0] if theirs else failed
    return f"| {case.name} | {ours} | {peer} | {', '.join(shown)} | {_goal(case)} | {verdict} |"


def _limit(case: Case, limits: dict[str, Any]) -> float:
    """Tokens a second: of samples, each step reads the weights once for all rows."""
    if case.load.kind == "train":
        return float(limits["train_tokens_per_s"])
    return float(limits["decode_tokens_per_s"]) * len(case.load.lengths) * case.load.samples


def _figure(case: Case, measured: dict[str, Any], side: int) -> str:
    seconds = measured["seconds"][side]
    median = statistics.median(seconds)
    size = f"{measured['peak_bytes'][side] / 1e9:.2f} GB"
    if case.load.kind == "memory":
        return size
    spread = f"{1000 * min(seconds):.0f}-{1000 * max(seconds):.0f} ms"
    if "tokens" in measured:
        return f"{measured['tokens'] / median:.0f} tokens/s ({spread})"
    beside = f", {size}" if case.memory else ""
    return f"{1000 * median:.0f} ms ({spread}){beside}"


def _goal(case: Case) -> str:
    parts = [f"{case.ratio:.2g}x"] if case.ratio else []
    parts += [f"{case.memory:.2g}x of memory"] if case.memory else []
    parts += [f"{case.share:.0%} of the limit"] if case.share else []
    parts += [f"{case.most_ms:.0f} ms"] if case.most_ms else []
    return ", ".join(parts)


def _growth(result: dict[str, Any]) -> str:
    charts = []
    for name, points in result.get("growth", {}).items():
        sizes = ", ".join(str(size) for size, _ in points)
        taken = ", ".join(f"{1000 * seconds:.0f}" for _, seconds in points)
        charts.append(
            "```mermaid\nxychart-beta\n"
            f'    title "Milliseconds of a round against {name}"\n'
            f'    x-axis "{name}" [{sizes}]\n    y-axis "ms"\n    line [{taken}]\n```\n'
        )
    return "\n".join(charts)


def main(names: Sequence[str]) -> None:
    files = [Path(name) for name in names]
    if not files:
        known = [*sorted(FOLDER.glob("results*.json")), FOLDER / "service.json"]
        files = [one for one in known if one.exists() and "-smoke" not in one.name]
    notes = PAGE.read_text().partition(NOTES)[2] if PAGE.exists() else ""
    PAGE.write_text(page([json.loads(file.read_text()) for file in files], notes))


if __name__ == "__main__":
    main(sys.argv[1:])
