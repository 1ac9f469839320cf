"""Groups that divide their models, on a Ray: a rank that is killed, and full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("ray")

from tests.engine.cluster.test_failures import GROUP, NAME, loop_of, opened
from weaver.engine.cluster.engine import ClusterEngine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterEngine]:
    home = tmp_path_factory.mktemp("home")
    engine = opened(home, GROUP(ranks=2, mode="fsdp", call_s=60.0))
    yield engine
    engine.close()


@pytest.mark.parametrize("mode", ["lora", "full_ft"])
async def test_a_rank_that_is_killed_is_a_pause_and_all_is_bit_identical(
    engine: ClusterEngine, tmp_path: Path, mode: Any
) -> None:
    group = engine._groups[NAME]
    undisturbed = await loop_of(engine, tmp_path / "home", mode=mode)
    starts = group.starts
    for number, (place, rank) in enumerate([("pass", 1), ("step", 0)], start=1):
        home = tmp_path / place
        seen = await loop_of(engine, home, killed_at=place, rank=rank, mode=mode)
        assert seen == undisturbed, place
        assert group.starts == starts + number, place
