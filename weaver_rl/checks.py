"""`check`: tries a reward before a run pays for it. Users and `--dry-run` call it.

The replies are nobody's: empty, blank, huge, garbage, the prompt itself, the numbers of the prompt.
A reward that pays for them, fails on them, or says the same of all of them and of the task's own
answer will not teach what was meant.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anyio.from_thread import start_blocking_portal

from weaver_rl.data import check_tasks
from weaver_rl.rewards import GroupReward, Reward, scorer
from weaver_rl.types import Failure, Reply, Score, Task

__all__ = ["check"]

ANSWER_FIELDS = ("answer", "completion", "gold", "solution", "target")
GARBAGE = "xq \x00 zz )(*&^ 🂡 ''' \\boxed{ <think> ``` 0 null"
NOTHING = Reply(text="", tokens=(), logprobs=(), sampling_logprobs=(), stop_reason="stop")
SLOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """`Problem("garbage", "pays 1 for 'xq ...' on {'prompt': ...}")`; `kind` is stable."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `check` found; prints as text for people."""

    problems: tuple[Problem, ...]
    calls: int
    rewards: Mapping[str, tuple[float, ...]]
    """By kind of reply, one for each task that was tried; without failures."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{problem.kind}: {problem.message}" for problem in self.problems]
        means = [f"{kind} {sum(r) / len(r):.3g}" for kind, r in self.rewards.items() if r]
        return "\n".join(
            [*lines, f"{self.calls} calls; mean reward by reply: {', '.join(means) or 'none'}"]
        )


def check(
    reward: Reward | GroupReward, tasks: Sequence[Task], *, tries: int = 4, timeout_s: float = 5.0
) -> Report:
    """Scores strange replies to the first `tries` tasks; never raises what the reward raises.

    Problems are `raised`, `timeout`, `bad_value`, `slow` (above one second a call), `constant` (one
    value for everything), and `pays_<kind>`: a reply that is no answer earns as much as the best
    one seen, or as the task's own `answer`.

    Raises:
        InvalidRequestError: no tasks.
    """
    with start_blocking_portal() as portal:  # a loop of its own: works in notebooks too
        return portal.call(_check, reward, tasks, tries, timeout_s)


def strange_replies(task: Task) -> dict[str, str]:
    """Texts that are no answer to the task, by kind."""
    prompt = task.get("prompt", "")
    said = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt)
    return {
        "empty": "",
        "blank": " \n\t ",
        "huge": "a1 " * 50_000,
        "garbage": GARBAGE,
        "echo": said or json.dumps(dict(task), default=str),
    }


async def _check(
    reward: Reward | GroupReward, tasks: Sequence[Task], tries: int, timeout_s: float
) -> Report:
    check_tasks(tasks, fields=())
    score = scorer(reward, timeout_s=timeout_s)
    rewards: dict[str, list[float]] = {}
    problems: dict[tuple[str, str], Problem] = {}
    calls = 0
    for task in tasks[:tries]:
        texts = strange_replies(task)
        answers = [str(task[name]) for name in ANSWER_FIELDS if task.get(name) is not None]
        if answers:
            texts["answer"] = answers[0]
        for kind, text in texts.items():
            begin = time.monotonic()
            (result,) = await score(task, [replace(NOTHING, text=text)])
            calls += 1
            for problem in _of_one(kind, text, result, time.monotonic() - begin):
                problems.setdefault((problem.kind, kind), problem)
            if not isinstance(result, Failure):
                rewards.setdefault(kind, []).append(result.reward)
    found = (*problems.values(), *_of_all(rewards))
    given = {kind: tuple(values) for kind, values in rewards.items()}
    return Report(problems=found, calls=calls, rewards=given)


def _of_one(kind: str, text: str, result: Score | Failure, seconds: float) -> list[Problem]:
    shown = f"the {kind} reply {text[:40]!r}"
    if isinstance(result, Failure):
        return [Problem(result.kind, f"on {shown}: {result.message}\n{result.traceback}".rstrip())]
    return [Problem("slow", f"{seconds:.1f} s for {shown}")] if seconds > SLOW_S else []


def _of_all(rewards: Mapping[str, Sequence[float]]) -> list[Problem]:
    everything = [value for values in rewards.values() for value in values]
    if len(everything) > 1 and len(set(everything)) == 1:
        what = "every reply, the right answer included" if "answer" in rewards else "every reply"
        return [Problem("constant", f"gives {everything[0]:g} to {what}.")]
    if not everything:
        return []
    right = min(rewards.get("answer", [max(everything)]))
    low = min(everything)
    return [
        Problem(
            f"pays_{kind}", f"gives {max(values):g} for the {kind} reply; the best is {right:g}."
        )
        for kind, values in rewards.items()
        if kind != "answer" and max(values) >= right and max(values) > low
    ]
