"""The pure decisions: which heads share a pass, and whose turn it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weaver.engine.threaded import FairShare
from weaver.server.lanes import Head, plan

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
