"""K targets at a position, and the likeliest tokens: values, gradients, tenants, float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import DEVICE, VOCAB, gradient_of, job, new_run, result_of, sequences
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from tests.engine.test_logprobs import head_adapter
from tests.engine.test_trainer import assert_close, flat_gradient, logprobs_of, ratio_datums
from tests.engine.wide_logits import BOUND, SPREADS, exact, logits_of
from weaver.engine.torch import logprobs as scoring
from weaver.engine.torch.logprobs import Queries, scored, target_scores, token_scores, top_scores
from weaver.engine.torch.memory import CHUNK_ELEMENTS, LEAST_ROWS
from weaver.engine.torch.packing import pack, stacked
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.trainer import TorchTrainer
from weaver.tensors import TensorData
from weaver.types import Datum

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.torch.model_store import ModelStore


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(model_folder: Callable[[str], Path]) -> None:
    save_tokenizer(model_folder("qwen3"))


def several(length: int, count: int, *, seed: int = 0) -> Datum:
    """Random tokens, targets and weights; some of these are 0, and all of position 1."""
    rng = np.random.default_rng(seed)
    weights = rng.choice(np.array([0, 0.25, 1, -0.5], np.float32), (length, count))
    weights[min(1, length - 1)] = 0
    return Datum(
        model_input=rng.integers(3, VOCAB, length).tolist(),
        loss_fn_inputs={
            "target_tokens": rng.integers(0, VOCAB, (length, count)),
            "weights": weights,
        },
    )


def column(datum: Datum, k: int) -> Datum:
    """With the k-th of its targets alone."""
    given = {name: x.to_numpy()[:, k] for name, x in datum.loss_fn_inputs.items()}
    return Datum(model_input=datum.model_input, loss_fn_inputs=given)


# --- of logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [7, 2**18])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("temperature", [None, 0.25])
def test_targets_and_their_gradients_are_those_of_float64(
    spread: str, vocab_size: int, temperature: float | None
) -> None:
    z = logits_of(spread, vocab_size).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, vocab_size, (len(z), 6), generator=generator)
    targets[0] = 3  # one token six times
    by = None if temperature is None else torch.full((len(z), 1), temperature)
    right = z.detach().double().requires_grad_()
    expected = exact(right, temperature or 1.0).gather(1, targets)
    found, _ = token_scores(z.detach(), targets, by)
    torch.testing.assert_close(found.double(), expected, atol=BOUND, rtol=1e-7)
    upstream = torch.randn(targets.shape, generator=generator)
    (ours,) = torch.autograd.grad((upstream * scored(z, targets, by, False)[0]).sum(), z)
    (theirs,) = torch.autograd.grad((upstream * expected).sum(), right)
    assert float((ours - theirs).norm()) < 2e-6 * float(theirs.norm())


@pytest.mark.parametrize("vocab_size", [256, 2**18])
@pytest.mark.parametrize("spread", SPREADS)
def test_the_likeliest_are_those_of_float64(spread: str, vocab_size: int) -> None:
    z = logits_of(spread, vocab_size)
    tokens, logprobs = top_scores(z, 256)
    right, order = exact(z, 1.0).sort(dim=-1, descending=True)
    torch.testing.assert_close(logprobs.double(), right[:, :256], atol=BOUND, rtol=1e-7)
    torch.testing.assert_close(exact(z, 1.0).gather(1, tokens), right[:, :256], atol=0, rtol=0)
    assert (tokens == order[:, :256]).float().mean() > 0.99  # but for equals


# --- of a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("chunked", [False, True])
def test_values_and_gradients_equal_the_whole_array(
    store: ModelStore, trained: tuple[bool, ...], chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sequences with 5 targets, 1 and 3 at each position; never more rows than a chunk has."""
    model = store.base("qwen3")
    rows: list[int] = []
    measured = scoring.token_scores

    def counting(logits: torch.Tensor, *given: Any, **named: Any) -> Any:
        rows.append(len(logits))
        return measured(logits, *given, **named)

    monkeypatch.setattr(scoring, "token_scores", counting)
    adapters = [head_adapter(model.head, i) if on else None for i, on in enumerate(trained)]
    lengths, widths = (120, 33, 95), (5, 1, 3)
    batch = pack(sequences(*lengths), adapters=adapters, device=DEVICE)
    rng = np.random.default_rng(1)
    given = [rng.integers(0, VOCAB, shape) for shape in zip(lengths, widths, strict=True)]
    targets = stacked(given).to(DEVICE)
    assert targets.shape == (248, 5) and int((targets == -1).sum()) == 33 * 4 + 95 * 2
    hidden = torch.randn(248, 32, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(DEVICE).requires_grad_()
    active = torch.tensor(rng.random(248) < 0.7, device=DEVICE)
    queries = Queries(
        targets=targets, temperature=torch.linspace(0.5, 1.5, 248, device=DEVICE), active=active
    )
    chunk = VOCAB if chunked else CHUNK_ELEMENTS
    scores = target_scores(model, hidden, batch, queries=queries, chunk=chunk, entropy=False)
    assert max(rows) <= (LEAST_ROWS if chunked else 248) and (len(rows) > 6) == chunked
    pieces = []
    for h, adapter in zip(hidden.split(lengths), adapters, strict=True):
        weight = model.head.linear.weight
        if adapter is not None:
            pair = adapter.pairs[model.head.path]
            weight = weight + adapter.scale * pair.b @ pair.a
        pieces.append(h @ weight.T)
    log_p = (torch.cat(pieces) / queries.temperature[:, None]).log_softmax(-1)
    asked = (targets >= 0) & active[:, None]
    expected = log_p.gather(1, targets.clamp(min=0))
    found = scores.logprobs
    torch.testing.assert_close(found[targets >= 0], expected[targets >= 0], atol=1e-5, rtol=1e-5)
    upstream = torch.tensor(rng.normal(size=(248, 5)), dtype=torch.float32, device=DEVICE) * asked
    inputs = [hidden, *(p for a in adapters if a is not None for p in a.tensors().values())]
    ours = torch.autograd.grad((upstream * found).sum(), inputs)
    theirs = torch.autograd.grad((upstream * expected).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) < 1e-5 * float(other.norm())


# --- of the trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "surrogate"])
@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_it_is_the_sum_over_each_target_alone(
    trainer: TorchTrainer, loss_fn: str, training_mode: Any
) -> None:
    whole = several(14, 4)
    parts = [column(whole, k) for k in range(4)]
    if loss_fn == "surrogate":
        whole, *parts = (
            one.model_copy(
                update={
                    "loss_fn_inputs": {
                        "target_tokens": one.loss_fn_inputs["target_tokens"],
                        "surrogate_weights": one.loss_fn_inputs["weights"],
                    }
                }
            )
            for one in (whole, *parts)
        )
    config = {"reduction": "sum", "temperature": 1.25}
    together = new_run(trainer, "together", training_mode=training_mode)
    result = result_of(trainer, job(together, [whole], loss_fn, config=config))
    apart = new_run(trainer, "apart", training_mode=training_mode)
    results = [result_of(trainer, job(apart, [one], loss_fn, config=config)) for one in parts]
    assert_close(flat_gradient(trainer, together), flat_gradient(trainer, apart))
    losses = [one.metrics["loss"] for one in results]
    assert result.metrics["loss"] == pytest.approx(sum(losses), rel=1e-5, abs=1e-6)
    found = result.loss_fn_outputs[0]["logprobs"]
    assert found.shape == (14, 4)
    columns = np.stack([one.loss_fn_outputs[0]["logprobs"].to_numpy() for one in results], 1)
    np.testing.assert_allclose(found.to_numpy(), columns, atol=1e-5)


def test_soft_targets_pull_towards_the_teacher(trainer: TorchTrainer) -> None:
    """The whole vocabulary as targets, by hand: -Σ p_teacher · log p, and its slope in the head."""
    run_id = new_run(trainer, training_mode="full_ft")
    tokens = sequences(9)[0]
    teacher = np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.3), 9).astype(np.float32)
    every = np.tile(np.arange(VOCAB), (9, 1))
    datum = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": every, "weights": teacher})
    result = result_of(trainer, job(run_id, [datum]))
    lp = result.loss_fn_outputs[0]["logprobs"].to_numpy().astype(np.float64)
    np.testing.assert_allclose(np.exp(lp).sum(1), 1, atol=1e-5)
    assert result.metrics["loss"] == pytest.approx(-(teacher * lp).sum() / teacher.sum(), rel=1e-5)
    slope = gradient_of(trainer, run_id)["lm_head.weight"]
    model = trainer._run(run_id).own
    assert model is not None
    with torch.no_grad():
        hidden = model.hidden_states(pack([tokens], adapters=[None], device=DEVICE)).cpu().double()
    by_logit = (torch.tensor(np.exp(lp)) - torch.tensor(teacher)) / teacher.sum()
    expected = by_logit.T @ hidden
    assert float((slope - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("budget", [1, 30])
def test_any_split_into_passes_gives_the_same_gradient(store: ModelStore, budget: int) -> None:
    data = [several(9, 3), several(5, 1, seed=1), several(17, 6, seed=2), column(several(8, 2), 0)]
    results, gradients = [], []
    for tokens in (budget, 10_000):
        trainer = TorchTrainer(store, tokens_per_pass=tokens)
        run_id = new_run(trainer)
        results.append(result_of(trainer, job(run_id, data, config={"reduction": "sum"})))
        gradients.append(flat_gradient(trainer, run_id))
    assert_close(*gradients)
    for one, other in zip(*(r.loss_fn_outputs for r in results), strict=True):
        assert one["logprobs"].shape == other["logprobs"].shape
        torch.testing.assert_close(one["logprobs"].to_torch(), other["logprobs"].to_torch())
    shapes = [one["logprobs"].shape for one in results[0].loss_fn_outputs]
    assert shapes == [(9, 3), (5, 1), (17, 6), (8,)]


def test_tenants_with_one_target_and_with_several_get_what_they_get_alone(
    store: ModelStore,
) -> None:
    sums = {"reduction": "sum"}
    together, jobs = TorchTrainer(store), []
    for i, (data, loss_fn, config) in enumerate(
        [
            ([several(9, 4), several(12, 2, seed=1)], "cross_entropy", sums),
            (ratio_datums(17, 5, seed=2), "ppo", {"entropy_coef": 0.1}),
            ([column(several(7, 2), 1)], "cross_entropy", sums),
        ]
    ):
        run_id = new_run(together, f"run-{i}", seed=i)
        jobs.append(job(run_id, data, loss_fn, config=config))
    merged = together.forward_backward(jobs)
    for i, (one, beside) in enumerate(zip(jobs, merged, strict=True)):
        alone = TorchTrainer(store)
        run_id = new_run(alone, f"run-{i}", seed=i)
        result = result_of(alone, one)
        assert not isinstance(beside, Exception)
        for a, b in zip(beside.loss_fn_outputs, result.loss_fn_outputs, strict=True):
            torch.testing.assert_close(
                a["logprobs"].to_torch(), b["logprobs"].to_torch(), atol=2e-5, rtol=0
            )
        assert beside.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
        assert_close(flat_gradient(together, run_id), flat_gradient(alone, run_id))
    assert logprobs_of(result_of(together, jobs[2])).shape == (7,)


# --- of the sampler -------------------------------------------------------------------------------


def trained_scores(trainer: TorchTrainer, tokens: list[int], targets: Any) -> Any:
    """float32 [T-1, K]: the trainer's, of targets [T, K] in the places of the tokens."""
    datum = Datum(
        model_input=tokens[:-1], loss_fn_inputs={"target_tokens": np.asarray(targets)[1:]}
    )
    work = job("run", [datum], config={"reduction": "sum"}, backward=False)
    return result_of(trainer, work).loss_fn_outputs[0]["logprobs"].to_numpy()


@pytest.mark.parametrize("read", [7, 512])
def test_what_is_said_of_a_prompt_is_what_the_trainer_says(
    store: ModelStore, trainer: TorchTrainer, read: int
) -> None:
    run_id = new_run(trainer)
    sampler = TorchSampler(store, prefill_tokens=read)
    sampler.publish("run", trainer.snapshot(run_id))
    (prompt,) = sequences(90)
    every = np.tile(np.arange(VOCAB), (90, 1))
    targets = np.random.default_rng(0).integers(0, VOCAB, (90, 3))
    targets[5], targets[0] = -1, -1
    asked = sample_job(
        prompt, weights_id="run", n=0, prompt_top_logprobs=5, prompt_targets=TensorData(targets)
    )
    beside = sample_job(prompt, "beside", weights_id="run", n=2, top_logprobs=3, seed=1)
    result = finish(sampler, [asked, beside])["job"]
    assert result.sequences == () and result.prompt_logprobs is None
    right = trained_scores(trainer, prompt, every)
    top, found = result.prompt_top_logprobs, result.prompt_target_logprobs
    assert top is not None and found is not None
    assert top.tokens.shape == top.logprobs.shape == (90, 5)
    assert (top.tokens.to_numpy()[0] == -1).all() and np.isnan(top.logprobs.to_numpy()[0]).all()
    np.testing.assert_allclose(top.logprobs.to_numpy()[1:], -np.sort(-right)[:, :5], atol=1e-4)
    chosen = np.take_along_axis(right, top.tokens.to_numpy()[1:], 1)
    np.testing.assert_allclose(top.logprobs.to_numpy()[1:], chosen, atol=1e-4)
    values = found.to_numpy()
    assert (np.isnan(values) == (targets < 0)).all()
    wanted = np.take_along_axis(right, targets[1:].clip(0), 1)
    kept = targets[1:] >= 0
    np.testing.assert_allclose(values[1:][kept], wanted[kept], atol=1e-4)


def test_what_is_said_of_samples_is_what_the_trainer_says(
    store: ModelStore, trainer: TorchTrainer
) -> None:
    """Untempered, whatever was drawn from; of jobs side by side that ask for 7, 2 and nothing."""
    run_id = new_run(trainer)
    sampler = TorchSampler(store)
    sampler.publish("run", trainer.snapshot(run_id))
    (prompt,) = sequences(11, seed=4)
    jobs = [
        sample_job(
            prompt,
            str(count),
            weights_id="run",
            n=3,
            temperature=0.7,
            top_p=0.9,
            seed=1,
            top_logprobs=count,
        )
        for count in (7, 2, 0)
    ]
    alone = {name: one for each in jobs for name, one in finish(sampler, [each]).items()}
    together = finish(sampler, jobs)
    for i, sequence in enumerate(together["7"].sequences):
        top, tokens = sequence.top_logprobs, [*prompt, *sequence.tokens]
        assert top is not None and top.tokens.shape == (len(sequence.tokens), 7)
        every = np.tile(np.arange(VOCAB), (len(tokens), 1))
        right = trained_scores(trainer, tokens, every)[len(prompt) - 1 :]
        np.testing.assert_allclose(top.logprobs.to_numpy(), -np.sort(-right)[:, :7], atol=1e-4)
        two = together["2"].sequences[i].top_logprobs
        assert two is not None and two.tokens.to_numpy().tolist() == top.tokens[:, :2].tolist()
        drawn = [
            list(row).index(t) if t in row else -1
            for row, t in zip(top.tokens, sequence.tokens, strict=True)
        ]
        for place, at in enumerate(drawn):
            if at >= 0:
                assert math.isclose(top.logprobs[place][at], sequence.logprobs[place], abs_tol=1e-5)
        assert together["0"].sequences[i].top_logprobs is None
        for name in ("7", "2"):
            one, other = alone[name].sequences[i], together[name].sequences[i]
            assert one.tokens == other.tokens == sequence.tokens
            assert one.top_logprobs is not None and other.top_logprobs is not None
            np.testing.assert_allclose(
                one.top_logprobs.logprobs, other.top_logprobs.logprobs, atol=2e-5
            )


def test_a_streamed_sample_has_them_in_pieces(store: ModelStore) -> None:
    sampler = TorchSampler(store)
    sampler.load("base", "qwen3", None)
    sampler.add(sample_job([5, 6, 7], n=2, stream=True, seed=1, top_logprobs=4))
    rows: dict[int, list[Any]] = {0: [], 1: []}
    result = None
    while result is None:
        for progress in sampler.step():
            for delta in progress.deltas:
                assert delta.top_logprobs is not None
                assert delta.top_logprobs.tokens.shape == (len(delta.tokens), 4)
                rows[delta.index] += delta.top_logprobs.tokens.tolist()
            result = progress.result or result
    for index, sequence in enumerate(result.sequences):
        assert sequence.top_logprobs is not None
        assert rows[index] == sequence.top_logprobs.tokens.tolist()


def test_in_deterministic_mode_the_numbers_are_the_same_in_any_company(store: ModelStore) -> None:
    sampler = TorchSampler(store, deterministic=True)
    sampler.load("base", "qwen3", None)
    mine = sample_job(sequences(40)[0], n=2, seed=3, top_logprobs=5, prompt_top_logprobs=5)
    others = [sample_job(s, str(i), n=2, seed=i) for i, s in enumerate(sequences(30, 50, seed=2))]
    assert finish(sampler, [mine]) == {"job": finish(sampler, [*others, mine])["job"]}
