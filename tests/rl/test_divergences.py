"""Divergences and their gradients against numpy over whole vocabularies; a teacher's answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
import torch

from weaver.errors import ConfigError, InvalidRequestError
from weaver_rl.divergences import SoftTargets, check_top_k, divergence, soft_loss, soft_targets

if TYPE_CHECKING:
    import numpy.typing as npt

    F = npt.NDArray[np.float64]

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TEMPERATURES = [1.0, 2.0, 0.5]


def log_softmax(z: F) -> F:
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


def right(z: F, teacher: F, tokens: Any, beta: float, temperature: float) -> float:
    """Summed over the places, from logits [N, V] of both, with plain loops."""
    total = 0.0
    for q_V, p_V, ids in zip(
        np.exp(log_softmax(z)), np.exp(log_softmax(teacher)), tokens, strict=True
    ):
        both = []
        for whole in (p_V, q_V):
            some = whole[ids]
            hot = some ** (1 / temperature)
            both.append([*(hot / hot.sum() * some.sum()), max(1 - some.sum(), 0.0)])
        p, q = (np.array(x) for x in both)
        m = beta * p + (1 - beta) * q

        def kl(a: F, b: F) -> float:
            return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x > 1e-9)

        ends = {0.0: kl(p, q), 1.0: kl(q, p)}
        total += ends.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    return total


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("K", [1, 3, 7])
def test_value_and_gradient_are_those_of_numpy(beta: float, temperature: float, K: int) -> None:
    """Of logits; K = 7 is the whole vocabulary."""
    rng = np.random.default_rng(K)
    z, teacher = 2 * rng.normal(size=(2, 4, 7))
    tokens = np.argsort(-teacher, 1)[:, :K]
    logits = torch.tensor(z, requires_grad=True)
    student = logits.log_softmax(-1).gather(1, torch.from_numpy(tokens))
    told = torch.from_numpy(np.take_along_axis(log_softmax(teacher), tokens, 1))
    loss = divergence(student, told, beta=beta, temperature=temperature).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    want = right(z, teacher, tokens, beta, temperature)
    assert loss.item() == pytest.approx(want, abs=2e-5)  # what the floor of the rest costs
    slopes = np.zeros_like(z)
    for place in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[place] = 1e-5
        ends = [right(z + s, teacher, tokens, beta, temperature) for s in (step, -step)]
        slopes[place] = (ends[0] - ends[1]) / 2e-5
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), slopes, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_least_where_both_agree(beta: float) -> None:
    rng = np.random.default_rng(0)
    told = torch.from_numpy(log_softmax(rng.normal(size=(5, 9)))[:, :4].copy())
    same = told.clone().requires_grad_()
    loss = divergence(same, told, beta=beta)
    assert loss.abs().max() < 1e-12
    (slope,) = torch.autograd.grad(loss.sum(), same)
    assert slope.abs().max() < 1e-9
    apart = divergence(told[:, [1, 0, 2, 3]], told, beta=beta)
    assert bool((apart > 0).all())


@pytest.mark.parametrize("beta", BETAS)
def test_certain_and_impossible_tokens_stay_finite(beta: float) -> None:
    """A student's certain token; one that it lacks; float32 sums above 1."""
    student = torch.tensor([[0.0, -200.0], [1e-6, -30.0], [-0.1, -3.0]], requires_grad=True)
    teacher = torch.tensor([[-90.0, 0.0], [0.0, -60.0], [-0.2, -torch.inf]])
    loss = divergence(student, teacher, beta=beta).sum()
    (slope,) = torch.autograd.grad(loss, student)
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(slope).all())
    assert slope[2, 1] == 0


def test_a_token_that_the_student_lacks_is_in_the_rest() -> None:
    soft = SoftTargets(np.array([[3, 9]]), np.log([[0.5, 0.3]]), np.ones(1)).within(8)
    assert soft.tokens.tolist() == [[3, 0]] and soft.logprobs[0, 1] == -np.inf
    student = torch.log(torch.tensor([[0.4, 0.2]]))
    found = divergence(student, torch.from_numpy(soft.logprobs), beta=0.0)
    assert float(found[0]) == pytest.approx(0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.6))


def test_places_are_weighed() -> None:
    rng = np.random.default_rng(1)
    soft = [
        SoftTargets(np.tile(np.arange(3), (n, 1)), log_softmax(rng.normal(size=(n, 5)))[:, :3], w)
        for n, w in ((2, np.array([1.0, 0.0])), (3, np.array([0.5, 2.0, 0.0])))
    ]
    found = [torch.from_numpy(log_softmax(rng.normal(size=(len(s.weights), 5)))[:, :3].copy())
             for s in soft]  # fmt: skip
    each = [divergence(f, torch.from_numpy(s.logprobs), beta=1.0).numpy()
            for f, s in zip(found, soft, strict=True)]  # fmt: skip
    want = each[0][0] + 0.5 * each[1][0] + 2 * each[1][1]
    for denominator, divided in ((None, 3.5), (10.0, 10.0)):
        loss, metrics = soft_loss(soft, denominator=denominator)(None, found)
        assert float(loss) == pytest.approx(want / divided)
    kept = np.concatenate([soft[0].logprobs[:1], soft[1].logprobs[:2]])
    assert metrics["teacher_rest"] == pytest.approx(1 - np.exp(kept).sum(1).mean())
    assert 0 <= metrics["agreement"] <= 1 and metrics["student_rest"] > 0


def teacher(tokens: Any, logprobs: Any, *, vocab: int = 9) -> Any:
    async def compute_logprobs(prompt: Any, *, top_k: int) -> Any:
        count = prompt.length
        top = SimpleNamespace(tokens=np.array(tokens), logprobs=np.array(logprobs))
        return SimpleNamespace(
            prompt_top_logprobs=top, prompt_logprobs=(None, *[-1.0] * (count - 1))
        )

    info = SimpleNamespace(vocab_size=vocab)
    return SimpleNamespace(compute_logprobs=compute_logprobs, model_info=info, base_model="t")


NOTHING, FINE = [-1, -1], [4, 2]
NAN, GOOD = [np.nan, np.nan], [-0.1, -4.0]


def ask(one: Any) -> tuple[SoftTargets, Any]:
    asked = np.array([False, True, True])

    async def run() -> tuple[SoftTargets, Any]:
        return await soft_targets(one, [1, 2, 3], asked, top_k=2)

    return anyio.run(run)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "said"),
    [
        ([NOTHING, FINE], [NAN, GOOD], "shapes"),
        ([[1], [2], [3]], [[-0.1]] * 3, "shapes"),
        ([NOTHING, FINE, FINE], [NAN, GOOD, [-0.1, np.nan]], "at token 2"),
        ([NOTHING, FINE, FINE], [NAN, [-0.1, -0.2], GOOD], "at token 1"),
        ([NOTHING, FINE, [4, 4]], [NAN, GOOD, GOOD], "at token 2"),
        ([NOTHING, FINE, [4, -1]], [NAN, GOOD, GOOD], "at token 2"),
    ],
)
def test_what_is_no_answer_of_a_teacher_is_named(tokens: Any, logprobs: Any, said: str) -> None:
    soft, own = ask(teacher([NOTHING, FINE, FINE], [NAN, GOOD, GOOD]))
    assert soft.tokens.tolist() == [FINE, FINE] and own.tolist() == [-1.0, -1.0]
    with pytest.raises(InvalidRequestError, match=f"teacher: gave .*{said}"):
        ask(teacher(tokens, logprobs))


@pytest.mark.parametrize("top_k", [0, 10, 257, 2.0, True, None])
def test_a_top_k_that_the_teacher_cannot_tell(top_k: Any) -> None:
    with pytest.raises(ConfigError, match=r"top_k.*1 to 9; t knows 9 tokens"):
        check_top_k(teacher([], []), top_k)
    with pytest.raises(ConfigError, match=r"teacher.*gives no log-probabilities"):
        check_top_k(object(), 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "logprobs", "weights"),
    [
        (np.zeros((2, 3), int), np.zeros((2, 2)), np.ones(2)),
        (np.zeros(2, int), np.zeros(2), np.ones(2)),
        (np.zeros((2, 3), int), np.full((2, 3), -1.0), np.ones(3)),
        (np.zeros((2, 3), int), np.full((2, 3), np.nan), np.ones(2)),
        (np.zeros((2, 3), int), np.full((2, 3), 0.5), np.ones(2)),
        (np.zeros((2, 3), int), np.full((2, 3), -1.0), np.full(2, np.inf)),
    ],
)
def test_targets_of_another_shape_or_no_numbers(tokens: Any, logprobs: Any, weights: Any) -> None:
    with pytest.raises(InvalidRequestError, match="soft targets"):
        SoftTargets(tokens, logprobs, weights)
