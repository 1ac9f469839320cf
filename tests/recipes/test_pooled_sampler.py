"""Recipes whose samples are drawn by workers: nothing changes but who draws.

At every step the trainer's log-probabilities of what was drawn are the sampler's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from recipes import demo, importance_sampling
from tests.contracts.test_sampler import CLOSE
from tests.engine.cluster.kit import vllm_environment
from tests.engine.cluster.torch_standin import an_environment
from tests.recipes.test_recipes import short
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.timeout(1800)

OF_A_RUN = 1e-4
"""Nats: what loops allow in float32, at any of a whole run's tokens, however unlikely."""


@pytest.fixture(params=["pool", pytest.param("vllm", marks=pytest.mark.slow)])
def sampler(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pool = request.param == "pool"
    environment = an_environment(tmp_path / "env") if pool else vllm_environment()
    monkeypatch.setenv("WEAVER_SAMPLER", "vllm")
    monkeypatch.setenv("WEAVER_SAMPLER_ENV", str(environment))
    monkeypatch.setenv("WEAVER_DEVICE", "cpu")
    monkeypatch.setenv("WEAVER_KV_CACHE_GB", "0.2")
    return str(request.param)


def gaps(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["gap/max"] for row in rows if row["step"]]


def test_a_recipe_is_the_same_and_both_agree_at_each_step(sampler: str) -> None:
    found = gaps(short(importance_sampling, "run"))
    assert len(found) == 2 and max(found) < CLOSE
    assert list(Path("home", "sampler").glob("*-*/*")) == []  # no weights are left


@pytest.mark.slow
def test_the_demo_learns_and_both_agree_at_each_step(sampler: str) -> None:
    assert demo.main(demo.Flags())
    [metrics] = Path("runs").glob("demo-*/metrics.jsonl")
    found = gaps(list(read_lines(metrics)))
    assert len(found) == demo.Flags().rl_steps and max(found) < OF_A_RUN
