"""The learning proofs on weaver-nano, each beside what must not learn. Minutes, so `slow`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.proofs import HELD_OUT, PROOFS, SAMPLING, TRAIN, Outcome, Proof, flipped
from weaver_rl.tasks.words import exact

if TYPE_CHECKING:
    from pathlib import Path

    from weaver_rl.advantages import AdvantageFn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("proof", "seed"),
    [(proof, seed) for proof in PROOFS for seed in proof.seeds],
    ids=lambda value: value.name.replace(" ", "-") if isinstance(value, Proof) else str(value),
)
def test_proof(proof: Proof, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)

    async def run() -> Outcome:
        async with AsyncServiceClient(home=tmp_path) as service:
            return await proof.run(service, seed)

    outcome = anyio.run(run)
    assert outcome.passed, f"{proof.gate}: got {outcome.value:.3f}; {outcome.note}"


@pytest.mark.parametrize(
    ("variable", "value", "steps"),
    [
        ("WEAVER_DTYPE", "bfloat16", 20),
        ("WEAVER_QUANTIZE", "int8", 20),
        ("WEAVER_QUANTIZE", "nf4", 60),  # which leaves so small a model less to begin with
    ],
)
@pytest.mark.parametrize(
    ("advantage", "low", "high"), [("group_centred", 0.7, 1), (flipped, 0, 0.1)]
)
def test_reinforcement_on_a_base_of_fewer_bits(
    variable: str,
    value: str,
    steps: int,
    advantage: str | AdvantageFn,
    low: float,
    high: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Learns, within the gap that is the default of float32; of flipped advantages not."""
    monkeypatch.setenv("WEAVER_THREADS", "1")
    if value == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path))
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    trained = rl.train(
        "weaver-nano",
        TRAIN,
        exact,
        advantage=advantage,
        held_out=HELD_OUT,
        evaluate_every=0,
        steps=steps,
        groups_per_step=16,
        sampling=SAMPLING,
        display=False,
    )
    assert np.isfinite(trained.metrics["gap/max"])
    assert low <= trained.metrics["eval/mean"] <= high, trained.metrics["eval/mean"]
