"""The pure decisions: which heads share a pass, and whose turn it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weaver.engine.threaded import FairShare
from weaver.server.lanes import Head, Turns, plan

HEADS = st.lists(
    st.builds(
        Head,
        merge_key=st.sampled_from([None, "a", "b"]),
        num_tokens=st.integers(0, 100),
    ),
    max_size=8,
)


@given(HEADS, st.integers(0, 300))
def test_a_plan_runs_the_first_head_and_only_what_can_share_its_pass(
    heads: list[Head], budget: int
) -> None:
    chosen = plan(heads, budget)
    assert chosen[:1] == [0][: len(heads)]
    assert chosen == sorted(set(chosen))
    if len(chosen) > 1:
        assert {heads[i].merge_key for i in chosen} == {heads[0].merge_key} != {None}
        assert sum(heads[i].num_tokens for i in chosen) <= budget


def test_a_plan_merges_what_fits() -> None:
    heads = [
        Head(merge_key=key, num_tokens=n) for key, n in [("a", 4), ("b", 1), ("a", 9), ("a", 5)]
    ]
    assert plan(heads, 9) == [0, 3]
    assert plan(heads, 100) == [0, 2, 3]
    assert plan(heads, 0) == [0]
    assert plan([], 9) == []


def test_both_sides_get_the_same_time_while_both_want_it() -> None:
    share, used = FairShare(), {"trainer": 0.0, "sampler": 0.0}
    for _ in range(1000):
        side = share.choose(trainer=True, sampler=True)
        assert side is not None
        cost = 1.0 if side == "trainer" else 0.03
        share.charge(side, cost)
        used[side] += cost
    assert abs(used["trainer"] - used["sampler"]) <= 1.0


def test_an_idle_side_saves_up_no_claim() -> None:
    share = FairShare()
    assert share.choose(trainer=False, sampler=False) is None
    for _ in range(100):
        assert share.choose(trainer=True, sampler=False) == "trainer"
        share.charge("trainer", 1.0)
    turns = []
    for _ in range(6):
        side = share.choose(trainer=True, sampler=True)
        assert side is not None
        share.charge(side, 1.0)
        turns.append(side)
    assert turns.count("sampler") <= 4 and turns.count("trainer") >= 2


def served(turns: Turns, waiting: dict[str, float]) -> str:
    """Who is next of those that wait, whose operation takes so long."""
    project = min(waiting, key=turns.place)
    turns.serve([project])
    turns.charge(project, waiting[project])
    return project


@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=6), st.integers(1, 200))
def test_projects_that_wait_get_the_same_time_however_long_their_operations_are(
    lengths: list[float], count: int
) -> None:
    turns, waiting = Turns(), {str(i): length for i, length in enumerate(lengths)}
    used_s = dict.fromkeys(waiting, 0.0)
    for _ in range(count):
        project = served(turns, waiting)
        used_s[project] += waiting[project]
    assert max(used_s.values()) - min(used_s.values()) <= max(lengths) + 1e-6


def test_projects_with_equal_operations_alternate() -> None:
    turns = Turns()
    assert [served(turns, {"a": 1.0, "b": 1.0}) for _ in range(6)] == ["a", "b"] * 3


def test_an_idle_project_saves_up_no_claim() -> None:
    turns = Turns()
    for _ in range(100):
        served(turns, {"a": 1.0})
    order = [served(turns, {"a": 1.0, "b": 1.0}) for _ in range(10)]
    assert order.count("b") in range(4, 7)


def test_who_joins_a_shared_call_pays_for_it() -> None:
    turns = Turns()
    turns.serve(["a", "b"])
    turns.charge("a", 1.0)
    turns.charge("b", 1.0)
    assert served(turns, {"b": 1.0, "c": 1.0}) == "c"
