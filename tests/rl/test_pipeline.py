"""Groups that teach nothing are kept or dropped as asked, and always counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.rl.helpers import group
from weaver_rl.algorithms.policy import filtered

if TYPE_CHECKING:
    from weaver_rl.plan import ZeroVariance

MIXED = group(0.0, 1.0)
FLAT = group(0.1 + 0.2, 0.3)
ONE = group(1.0, None)
EMPTY = group(None, None)
GROUPS = [MIXED, FLAT, ONE, EMPTY]


@pytest.mark.parametrize(
    ("choice", "kept"), [("keep", [MIXED, FLAT, ONE]), ("drop", [MIXED]), ("resample", [MIXED])]
)
def test_kept_and_counted(choice: ZeroVariance, kept: list[object]) -> None:
    got = filtered(GROUPS, choice)
    assert list(got.kept) == kept
    assert len(got.kept) + len(got.dropped) == len(GROUPS)
    assert got.metrics == {
        "groups/kept": len(kept),
        "groups/dropped": 4 - len(kept),
        "groups/empty": 1,
    }


def test_nothing_in_nothing_out() -> None:
    assert filtered([]).metrics == {
        "groups/kept": 0.0,
        "groups/dropped": 0.0,
        "groups/empty": 0.0,
    }
