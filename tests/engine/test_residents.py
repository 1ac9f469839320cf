"""Which models leave memory for another, by plain numbers."""

from __future__ import annotations

from typing import Any

import pytest

from weaver.engine.torch.residents import PAUSE_S, TURNS, Residents

NONE: Any = None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def residents(*sizes: int, budget: int | None = 100, **how: Any) -> tuple[Residents, Clock]:
    """Models `a`, `b`, ... that were loaded one second after the other, in four seconds each."""
    clock = Clock()
    found = Residents(budget=budget, **{"strict": True, "memory": None, **how}, clock=clock)
    for name, size in zip("abcdef", sizes, strict=False):
        clock.now += 1
        found.put(name, NONE, nbytes=size, load_s=4.0)
    return found, clock


@pytest.mark.parametrize(
    ("sizes", "new", "in_use", "leaving"),
    [
        ((), 100, "", []),
        ((), 101, "", None),
        ((40, 40), 20, "", []),
        ((40, 40), 21, "", ["a"]),
        ((40, 40), 21, "a", ["b"]),
        ((40, 40), 61, "", ["a", "b"]),
        ((40, 40), 61, "b", None),
        ((40, 40), 21, "ab", None),
        ((10, 40, 40), 40, "", ["a", "b"]),
    ],
)
def test_those_used_least_lately_leave_unless_they_are_in_use(
    sizes: tuple[int, ...], new: int, in_use: str, leaving: list[str] | None
) -> None:
    found, _ = residents(*sizes)
    assert found.leaving(new, owned=0, in_use=in_use) == leaving


def test_use_moves_a_model_to_the_end() -> None:
    found, clock = residents(40, 40)
    clock.now += 1
    found.touch("a")
    found.touch("never heard of")
    assert found.leaving(30, owned=0, in_use="") == ["b"]


def test_a_default_budget_lets_one_that_is_alone_have_more() -> None:
    found, _ = residents(40, 40, strict=False)
    assert found.leaving(500, owned=0, in_use="") == ["a", "b"]
    assert found.leaving(500, owned=0, in_use="a") is None
    assert found.could_hold(500, owned=0)
    assert not residents()[0].could_hold(500, owned=0)
    assert residents(500, budget=None)[0].leaving(10**12, owned=0, in_use="") == []


def test_models_of_runs_count_against_the_memory_and_not_the_budget() -> None:
    found, _ = residents(40, memory=200)
    assert found.leaving(60, owned=90, in_use="") == []
    assert found.leaving(60, owned=101, in_use="") == ["a"]
    assert found.leaving(60, owned=141, in_use="") is None
    assert not found.could_hold(60, owned=141)
    assert found.leaving(150, owned=0, in_use="", base=False) == []
    assert found.leaving(170, owned=0, in_use="", base=False) == ["a"]
    assert found.leaving(170, owned=0, in_use="a", base=False) is None


def test_a_model_keeps_its_place_for_a_while_though_another_waits() -> None:
    found, clock = residents(40, 40)
    clock.now += PAUSE_S / 4
    found.touch("a")
    clock.now += PAUSE_S / 2  # each takes 4 s to load
    assert found.delay_s([], since=clock.now) == 0
    assert found.delay_s(["b"], since=clock.now) == PAUSE_S / 4
    assert found.delay_s(["a", "b"], since=clock.now) == PAUSE_S / 2
    began = clock.now
    while clock.now < began + TURNS * 4:
        assert 0 < found.delay_s(["a"], since=began) <= PAUSE_S
        clock.now += PAUSE_S / 4
        found.touch("a")  # without a pause
    assert found.delay_s(["a"], since=began) == 0
