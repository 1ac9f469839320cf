"""Mathematical answers compared by `math-verify` (the extra `tasks`).

Its own time-outs use signals, which fail in threads; they are switched off, and those of
`rewards.scorer` hold.
"""

from __future__ import annotations

from weaver.errors import requiring
from weaver_rl.types import Reply, Task

MAX_CHARACTERS = 20_000
"""So much of a reply's end is read: parsing grows faster than the text."""


def math_answer(task: Task, reply: Reply) -> float:
    r"""1 if the last mathematical expression of the reply equals `task["answer"]`.

    Understands LaTeX, `\boxed{...}` and plain expressions: `\frac{1}{2}` is `0.5`.

    Raises:
        MissingDependencyError: math-verify is not installed.
        ValueError: the task's own answer cannot be read.
    """
    with requiring("math_answer", "tasks"):
        from math_verify import parse, verify
    answer = str(task["answer"])
    gold = parse(
        answer if "\\" not in answer or "$" in answer else f"${answer}$", parsing_timeout=None
    )
    if not gold:
        raise ValueError(f"the task's answer {task['answer']!r} is not an expression")
    said = parse(reply.text[-MAX_CHARACTERS:], parsing_timeout=None)
    return float(bool(said) and verify(gold, said, timeout_seconds=None))
