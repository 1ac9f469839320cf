"""`rl.check` finds what is wrong with a reward, and nothing where nothing is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import weaver_rl as rl
from weaver.errors import InvalidRequestError

if TYPE_CHECKING:
    from weaver_rl.rewards import Reward
    from weaver_rl.types import Reply, Task

TASKS = [{"prompt": "rev:abc=", "answer": "cba"}, {"prompt": "rev:xy=", "answer": "yx"}]


def exact(task: Task, reply: Reply) -> float:
    return float(reply.text == task["answer"])


async def async_exact(task: Task, reply: Reply) -> rl.Score:
    return rl.Score(exact(task, reply))


def hangs_on_huge(task: Task, reply: Reply) -> float:
    if len(reply.text) > 1000:
        time.sleep(2)
    return exact(task, reply)


@pytest.mark.parametrize(
    ("reward", "kinds"),
    [
        (exact, set()),
        (async_exact, set()),
        (lambda task, reply: 1.0, {"constant"}),
        (lambda task, reply: float(reply.text[0] == task["answer"][0]), {"raised"}),
        (lambda task, reply: None, {"bad_value"}),
        (hangs_on_huge, {"timeout"}),
        (lambda task, reply: len(reply.text), {"pays_huge", "pays_garbage", "pays_echo"}),
        (lambda task, reply: float(set(task["answer"]) <= set(reply.text)), {"pays_echo"}),
        (lambda task, reply: float(reply.text != ""), {"pays_blank", "pays_huge", "pays_garbage"}),
    ],
)
def test_kinds(reward: Reward, kinds: set[str]) -> None:
    report = rl.check(reward, TASKS, timeout_s=0.3)
    found = {problem.kind for problem in report.problems}
    assert kinds <= found
    assert report.ok == (not kinds)
    assert not kinds or all(kind in str(report) for kind in kinds)


def test_each_problem_is_told_once() -> None:
    report = rl.check(lambda task, reply: 1 / 0, TASKS)
    assert len(report.problems) == 6
    assert report.calls == 12
    assert "ZeroDivisionError" in str(report)


@pytest.mark.anyio
async def test_where_a_loop_runs_already_as_in_a_notebook() -> None:
    assert rl.check(exact, TASKS).ok


def test_without_answers_and_without_tasks() -> None:
    assert rl.check(lambda task, reply: 0.5, [{"prompt": "x"}]).problems[0].kind == "constant"
    with pytest.raises(InvalidRequestError):
        rl.check(exact, [])
