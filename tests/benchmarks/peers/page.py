"""Writes docs/benchmarks.md from what `run` has measured, so that no figure is typed by hand.

    python -m tests.benchmarks.peers.page [FILE ...]

The first file is the machine whose figures are judged; others are shown beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers.cases import CASES, Case
from tests.benchmarks.peers.shapes import FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `python -m tests.benchmarks.peers.page` from what `make bench` has measured. Whole
processes run in turns (ABAB...), each through its public API, by wall time on all cores in float32;
a figure is the median, and what counts is the ratio: processors differ by a factor of three. The
model is a Qwen3 of 60 M parameters (hidden 512, 8 layers, vocabulary 32,000) with random weights
and LoRA rank 32, unless a case says otherwise. Peers are installed in environments of their own, at
their defaults.

`make bench` measures it anew, in half an hour on two cores; one case alone is
`python -m tests.benchmarks.peers.run --only "2 x 64"`. No figure here is of a GPU.
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    parts = [HEAD]
    for result in results:
        parts += [_machine(result), _table(result), _growth(result)]
    return "\n".join(parts)


def _machine(result: dict[str, Any]) -> str:
    machine, limits = result["machine"], result.get("limits")
    flags = ", ".join(machine["flags"]) or "none of AVX2 and AVX-512"
    text = (
        f"## {machine['processor']}, {machine['cores']} cores ({flags})\n\n"
        f"{machine['memory_gb']:.0f} GB, Python {machine['python']}, torch {machine['torch']}.\n"
    )
    if limits:
        products = ", ".join(f"{name}: {speed}" for name, speed in limits["gemm_gflops"].items())
        text += (
            f"Its limits: {limits['train_tokens_per_s']:.0f} tokens/s of training by matrix "
            f"products alone (GFLOP/s of x Wᵀ at its best: {products}); "
            f"{limits['bandwidth_gb_per_s']} GB/s, which is "
            f"{limits['decode_tokens_per_s']:.0f} tokens/s of one row.\n"
        )
    return text


def _table(result: dict[str, Any]) -> str:
    rows = ["| case | ours | theirs | ratio | to reach | |", "|---|---|---|---|---|---|"]
    for case in CASES:
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
    verdicts = []
    ours, *theirs = [_figure(case, measured, side) for side in range(len(measured["seconds"]))]
    ratio = measured.get("ratio")
    shown = f"{ratio:.2f}" if ratio else ""
    if case.ratio and ratio:
        verdicts.append(ratio >= case.ratio)
    share = None
    if case.share and limits:
        share = measured["tokens_per_s"] / limits["train_tokens_per_s"]
        shown += f"; {share:.0%} of the limit"
        verdicts.append(share >= case.share)
    if case.most_ms:
        verdicts.append(1000 * measured["median_s"][0] <= case.most_ms)
    verdict = "" if not verdicts else "reached" if all(verdicts) else "**missed**"
    peer = theirs[0] if theirs else ""
    return f"| {case.name} | {ours} | {peer} | {shown} | {_goal(case)} | {verdict} |"


def _figure(case: Case, measured: dict[str, Any], side: int) -> str:
    seconds = measured["seconds"][side]
    median = statistics.median(seconds)
    if case.load.kind == "memory":
        return f"{measured['peak_bytes'][side] / 1e9:.2f} GB"
    spread = f"{1000 * min(seconds):.0f}-{1000 * max(seconds):.0f} ms"
    if case.load.kind in ("train", "sample"):
        return f"{case.load.tokens / median:.0f} tokens/s ({spread})"
    return f"{1000 * median:.0f} ms ({spread})"


def _goal(case: Case) -> str:
    parts = [f"{case.ratio:.2g}x {case.peer}"] if case.ratio else []
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


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or [FOLDER / "results.json"]
    PAGE.write_text(page([json.loads(file.read_text()) for file in files]))
