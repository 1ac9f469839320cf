"""Which group has a run."""

from __future__ import annotations

from collections import Counter

from weaver.engine.cluster.lanes import GroupLanes

GROUPS = [f"group-{i}" for i in range(16)]


def test_runs_are_spread_evenly_and_stay_where_they_are() -> None:
    lanes = GroupLanes()
    first = {f"run-{i}": lanes.of(f"run-{i}", GROUPS) for i in range(160)}
    assert set(Counter(first.values()).values()) == {10}
    for run_id, group in first.items():
        lanes.add(run_id)
        assert lanes.of(run_id, GROUPS) == group


def test_a_new_run_goes_where_runs_have_left() -> None:
    lanes = GroupLanes()
    for i in range(160):
        lanes.of(f"run-{i}", GROUPS)
        lanes.add(f"run-{i}")
    left = [f"run-{i}" for i in range(160) if lanes.of(f"run-{i}", GROUPS) == "group-3"]
    for run_id in left[:2]:
        lanes.discard(run_id)
        lanes.discard(run_id)
    for i in range(2):
        assert lanes.of(f"new-{i}", GROUPS) == "group-3"
        lanes.add(f"new-{i}")
    assert lanes.of("new-2", GROUPS) != "group-3" or len(left) < 10
    lanes.add(left[0])  # it comes back
    assert lanes.of(left[0], GROUPS) == "group-3"


def test_runs_that_never_came_are_not_counted() -> None:
    lanes = GroupLanes()
    for i in range(8):
        lanes.of(f"refused-{i}", ["a", "b"])
    lanes.of("run", ["a", "b"])
    lanes.add("run")
    there = lanes.of("run", ["a", "b"])
    assert lanes.of("next", ["a", "b"]) != there


def test_the_same_runs_in_the_same_order_go_to_the_same_groups() -> None:
    one, other = GroupLanes(), GroupLanes()
    ids = [f"run-{i}" for i in range(50)]
    assert [one.of(i, GROUPS) for i in ids] == [other.of(i, GROUPS) for i in ids]
