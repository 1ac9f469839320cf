"""Log-probabilities, entropies and draws over large vocabularies against float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import weaver_rl as rl
from tests.engine.test_sampling import draw
from tests.engine.wide_logits import BOUND, ROWS, SPREADS, exact, logits_of
from weaver import ServiceClient, types
from weaver.engine.torch.logprobs import scored, token_scores
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from tests.zoo import Zoo


@pytest.mark.parametrize("vocab_size", [7, 2**18])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("temperature", [None, 0.25, 1.5])
def test_scores_and_gradients_are_those_of_float64(
    spread: str, vocab_size: int, temperature: float | None
) -> None:
    z = logits_of(spread, vocab_size).requires_grad_()
    targets = torch.tensor([0, 3, 3, vocab_size - 1, int(z[4].argmax())])
    column = None if temperature is None else torch.full((ROWS, 1), temperature)
    policy = torch.empty_like(z)
    lp, entropy = token_scores(z.detach(), targets, column, entropy=True, policy=policy)
    lp_only, _ = token_scores(z.detach(), targets, column)
    right = z.detach().double().requires_grad_()
    log_p = exact(right, temperature or 1.0)
    expected_lp = log_p.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(lp.double(), expected_lp, atol=BOUND, rtol=1e-7)
    assert torch.equal(lp, lp_only)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=BOUND, rtol=0)
    torch.testing.assert_close(policy.double(), log_p.exp(), atol=1e-6, rtol=2e-5)
    upstream = torch.linspace(-1, 2, ROWS)
    for weight in (0.0, 0.3):
        values, entropies = scored(z, targets, column, True)
        loss = (upstream * values).sum() + (weight * entropies.sum() if weight else 0)
        (ours,) = torch.autograd.grad(loss, z)
        loss = (upstream * expected_lp).sum() + weight * expected_entropy.sum()
        (theirs,) = torch.autograd.grad(loss, right, retain_graph=True)
        assert float((ours - theirs).norm()) < 2e-6 * float(theirs.norm())


@pytest.mark.parametrize("vocab_size", [2**18])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.25),
        SamplingParams(temperature=1.5, top_p=0.9),
        SamplingParams(top_p=0.3),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=50),
        SamplingParams(min_p=0.05),
    ],
    ids=lambda p: p.model_dump_json(exclude_defaults=True),
)
def test_draws_weigh_as_float64_does(spread: str, vocab_size: int, params: SamplingParams) -> None:
    z = logits_of(spread, vocab_size)
    draws = draw(z, [params] * ROWS, torch.linspace(0.05, 0.95, ROWS, dtype=torch.float64))
    chosen = draws.tokens[:, None]
    policy = exact(z, 1.0)
    torch.testing.assert_close(
        draws.logprobs.double(), policy.gather(1, chosen)[:, 0], atol=BOUND, rtol=1e-7
    )
    if params.temperature == 0:
        return
    p = exact(z, params.temperature).exp()
    values, order = p.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    rank = torch.arange(vocab_size)
    keep = before < (params.top_p if params.top_p < 1 else 2)
    keep &= (rank < params.top_k) if params.top_k > 0 else True
    keep &= values >= params.min_p * values[:, :1]
    kept = torch.zeros_like(p).scatter(1, order, values * keep)
    q = (kept / kept.sum(-1, keepdim=True)).log().gather(1, chosen)[:, 0]
    torch.testing.assert_close(draws.sampling_logprobs.double(), q, atol=BOUND, rtol=1e-7)


@torch.no_grad()
def right_logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """float64 [T-1, V]: transformers' own, of a model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits: torch.Tensor = model(torch.tensor([tokens])).logits
    return logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize(("mode", "unembed"), [("lora", True), ("lora", False), ("full_ft", None)])
def test_trainer_and_sampler_agree_with_float64_on_a_large_vocabulary(
    mode: Any, unembed: bool | None, zoo: Zoo, home: Path
) -> None:
    folder = zoo.model("wide")
    lora = None if unembed is None else {"rank": 4, "train_unembed": unembed}
    prompt = list(range(5, 5 + 4000 * 9, 4000))
    with ServiceClient(home=home) as service:
        trainer = service.create_model(str(folder), lora, training_mode=mode)
        sampler = trainer.save_weights_and_get_sampling_client()
        drawn = sampler.sample(
            prompt=types.ModelInput.from_ints(prompt),
            sampling_params=SamplingParams(max_tokens=16, top_p=0.95, seed=1),
            top_logprobs=20,
        )
        sequence = drawn.sequences[0]
        tokens = [*prompt, *sequence.tokens]
        scores = sampler.compute_logprobs(types.ModelInput.from_ints(tokens))[1:]
        targets = np.random.default_rng(0).integers(
            0, sampler.model_info.vocab_size, (len(tokens), 6)
        )
        more = sampler.compute_logprobs(tokens, top_k=20, targets=targets)
        inputs = {"target_tokens": targets[1:]}
        wide = [types.Datum(model_input=tokens[:-1], loss_fn_inputs=inputs)]
        several = trainer.forward_backward(wide, wait=True).loss_fn_outputs[0]["logprobs"]
        data = [types.Datum(model_input=tokens[:-1], loss_fn_inputs={"target_tokens": tokens[1:]})]
        passes = [
            trainer.forward(data, wait=True),
            trainer.forward_backward(data, wait=True),
        ]
    log_p = right_logprobs(folder, tokens)
    right = log_p.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    likeliest = log_p.topk(20).values.numpy()
    top, of_sample = more.prompt_top_logprobs, sequence.top_logprobs
    assert top is not None and of_sample is not None and more.prompt_target_logprobs is not None
    of_targets = log_p.gather(-1, torch.tensor(targets[1:])).numpy()
    for ours, theirs in (
        (top.logprobs[1:], likeliest),
        (of_sample.logprobs, likeliest[len(prompt) - 1 :]),
        (more.prompt_target_logprobs[1:], of_targets),
        (several, of_targets),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND)
    found = [np.asarray(p.loss_fn_outputs[0]["logprobs"], dtype=np.float64) for p in passes]
    found.append(np.array(scores, dtype=np.float64))
    found.append(np.array([*right[: len(prompt) - 1], *sequence.logprobs], dtype=np.float64))
    for ours in found:
        np.testing.assert_allclose(ours, right, rtol=0, atol=BOUND)


def test_reinforcement_on_a_large_vocabulary_passes_the_check_of_the_gap(
    zoo: Zoo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step, with the entropy in the loss and a temperature."""
    monkeypatch.setenv("WEAVER_HOME", str(home))
    trained = rl.train(
        str(zoo.model("wide")),
        [{"prompt": f"{i} is it?"} for i in range(4)],
        lambda task, reply: float(len(reply.text) % 7),
        steps=2,
        groups_per_step=2,
        group_size=3,
        sampling=SamplingParams(max_tokens=8, temperature=0.8),
        objective=rl.Objective(loss_fn="ppo", config={"entropy_coef": 0.01}),
        display=False,
    )
    assert 0 < trained.metrics["gap/max"] < 4e-5
