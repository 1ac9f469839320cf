"""Sums, a calculator tool, and countdown: tasks on numbers without a download."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from random import Random

import weaver_rl as rl

OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
MAX_LENGTH = 200
"""Characters of an expression; beyond it is nobody's honest arithmetic."""


def sum_tasks(count: int, *, seed: int = 0, limit: int = 100) -> list[rl.Task]:
    """Tasks `{"prompt": "12+34=", "answer": "46"}`; both numbers are below `limit`."""
    rng = Random(seed)
    pairs = [(rng.randrange(limit), rng.randrange(limit)) for _ in range(count)]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def calculate(expression: str) -> str:
    """Works out an expression of numbers, + - * / and brackets, exactly."""
    return str(evaluate(expression))


def calculator_tasks(count: int, *, seed: int = 0) -> list[rl.Task]:
    """Tasks `{"prompt": "What is 123 * 45 + 6?", "answer": "5541"}` for `with_calculator`."""
    rng = Random(seed)
    tasks: list[rl.Task] = []
    for _ in range(count):
        text = f"{rng.randint(11, 999)} * {rng.randint(11, 99)} + {rng.randint(1, 99)}"
        tasks.append({"prompt": f"What is {text}?", "answer": calculate(text)})
    return tasks


async def with_calculator(agent: rl.Agent, task: rl.Task) -> float:
    """An environment: 1 if the last number that the model says, with its tool, is the answer."""
    if "tools" not in str(getattr(agent.tokenizer, "chat_template", "")):
        agent.system(rl.describe([calculate]))
    reply = await rl.use_tools(agent, task["prompt"], tools=[calculate])
    words = reply.text.replace(",", "").rstrip(". ").split()
    return float(bool(words) and words[-1] == task["answer"])


def countdown_tasks(count: int, *, seed: int = 0, numbers: int = 3) -> list[rl.Task]:
    """Tasks to reach a target with each number at most once; every one can be solved.

    `{"prompt": "Use 3, 5, 2 to make 16: ", "numbers": [3, 5, 2], "target": 16, ...}`
    """
    rng = Random(seed)
    tasks: list[rl.Task] = []
    while len(tasks) < count:
        chosen = [rng.randint(1, 20) for _ in range(numbers)]
        text = str(chosen[0])
        for number in chosen[1:]:
            text = f"({text} {rng.choice('+-*')} {number})"
        target = evaluate(text)
        if 0 < target <= 200:
            said = ", ".join(map(str, chosen))
            tasks.append(
                {
                    "prompt": f"Use {said} to make {target}: ",
                    "numbers": chosen,
                    "target": int(target),
                    "answer": text,
                }
            )
    return tasks


def countdown(task: rl.Task, reply: rl.Reply) -> float:
    """1 if the reply is an expression of the task's numbers, each once at most, with its target.

    Replies that are no such expression have 0; nothing of them is ever executed.
    """
    try:
        tree = _parse(reply.text.partition("=")[0].strip())
        value = _value(tree)
    except (ValueError, ZeroDivisionError):
        return 0.0
    left = list(task["numbers"])
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if node.value not in left:
                return 0.0
            left.remove(node.value)
    return float(value == task["target"])


def evaluate(expression: str) -> Fraction:
    """The exact value of `(1 + 2) * 3 / 4`.

    Raises:
        ValueError: not such an expression, or longer than 200 characters.
        ZeroDivisionError
    """
    return _value(_parse(expression))


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an expression of {len(text)} characters, more than {MAX_LENGTH}")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an expression: {error}") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * / and brackets are allowed")
