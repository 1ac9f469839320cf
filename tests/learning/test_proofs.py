"""The learning proofs on weaver-nano, each beside what must not learn. Minutes, so `slow`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from weaver import AsyncServiceClient
from weaver_rl.proofs import PROOFS, Outcome, Proof

if TYPE_CHECKING:
    from pathlib import Path

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
