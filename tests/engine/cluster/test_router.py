"""Which worker draws what, and whose turn it is."""

from __future__ import annotations

from collections import Counter

from tests.optional import given, settings, st
from weaver.engine.cluster.router import LIGHT, PREFIX_TOKENS, Turns, choose, key_of

IDLE = dict.fromkeys("abcd", 0)
KEYS = [key_of("w", [i]) for i in range(400)]


def test_a_prompt_goes_where_its_beginning_was_read() -> None:
    begun = list(range(PREFIX_TOKENS))
    assert key_of("w", [*begun, 1]) == key_of("w", [*begun, 2, 3])
    assert len({key_of("w", begun[1:]), key_of("w", begun), key_of("v", begun)}) == 3
    assert len({choose(key_of("w", [*begun, i]), IDLE) for i in range(20)}) == 1


def test_keys_are_spread_and_only_those_of_a_worker_that_left_move() -> None:
    before = [choose(key, IDLE) for key in KEYS]
    assert min(Counter(before).values()) > len(KEYS) / len(IDLE) / 2
    left = {name: load for name, load in IDLE.items() if name != "b"}
    after = [choose(key, left) for key in KEYS]
    moved = [a for a, b in zip(before, after, strict=True) if a != b]
    assert set(moved) == {"b"} and len(moved) == before.count("b")


def test_an_overloaded_first_choice_leaves_to_the_second() -> None:
    key = KEYS[0]
    first = choose(key, IDLE)
    second = choose(key, {name: load for name, load in IDLE.items() if name != first})
    assert first is not None and second is not None
    assert choose(key, IDLE | {first: LIGHT}) == first  # though the mean is a quarter of that
    assert choose(key, IDLE | {first: LIGHT + 1}) == second
    even = dict.fromkeys(IDLE, 100)
    assert choose(key, even | {first: 130}) == first  # the mean is 107.5
    assert choose(key, even | {first: 150}) == second  # that of 112.5 is exceeded by a third
    assert choose(key, even | {first: 150, second: 151}) == first


def test_one_without_room_is_passed_over() -> None:
    key = KEYS[0]
    full = {choose(key, IDLE)}
    assert choose(key, IDLE, has_room=lambda name: name not in full) not in full
    assert choose(key, IDLE, has_room=lambda name: False) is None
    assert choose(key, {}) is None


def test_tenants_take_turns_and_whoever_holds_least_is_next() -> None:
    turns: Turns[str] = Turns()
    for item in ["a1", "a2", "a3", "b1", "c1"]:
        turns.add(item[0], item)
    order = []
    while (item := turns.next()) is not None:
        order.append(item)
        turns.begin(item[0], rows=1)
    assert order == ["a1", "b1", "c1", "a2", "a3"]
    turns.end("a", rows=1)
    turns.add("b", "b2")
    turns.add("b", "b0", first=True)
    assert (turns.next(), len(turns)) == ("b0", 2)
    turns.remove("b", "b0")
    turns.remove("b", "unknown")
    assert turns.drain() == ["b2"] and turns.next() is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
@settings(max_examples=50, deadline=None)
def test_nothing_that_waits_is_lost(steps: list[tuple[str, bool]]) -> None:
    turns: Turns[int] = Turns()
    waiting, begun = set(), []
    for number, (tenant, is_new) in enumerate(steps):
        if is_new or not waiting:
            turns.add(tenant, number)
            waiting.add((tenant, number))
        else:
            item = turns.next()
            [owner] = [t for t, n in waiting if n == item]
            turns.begin(owner, rows=1)
            waiting.remove((owner, item))
            begun.append(item)
        assert len(turns) == len(waiting)
    assert sorted(turns.drain()) == sorted(number for _, number in waiting)
