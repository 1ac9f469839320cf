"""The sampler's numbers: against `generate`, against the trainer, and against itself in company."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.engine.conftest import (
    ARCHITECTURES,
    VOCAB,
    datum,
    job,
    new_run,
    reference_model,
    result_of,
    sequences,
)
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from weaver.engine.torch.sampler import TorchSampler
from weaver.types import AdamParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from weaver.engine.base import SampleJob
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.trainer import TorchTrainer
    from weaver.types import SampledSequence, SampleResult


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(model_folder: Callable[[str], Path]) -> None:
    for name in ARCHITECTURES:
        save_tokenizer(model_folder(name))


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_tokens_are_those_of_generate(
    architecture: str, penalty: float, store: ModelStore, model_folder: Callable[[str], Path]
) -> None:
    """Together, read in pieces of 16 tokens; most prompts are longer than the sliding windows."""
    prompts = sequences(2, 5, 16, 33, 70, seed=3)
    sampler = TorchSampler(store, prefill_tokens=16)
    sampler.load("base", architecture, None)
    jobs = [
        sample_job(p, str(i), temperature=0.0, max_tokens=40, repetition_penalty=penalty)
        for i, p in enumerate(prompts)
    ]
    results = finish(sampler, jobs)
    reference = reference_model(model_folder(architecture))
    for i, prompt in enumerate(prompts):
        theirs = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
        )[0, len(prompt) :]
        assert list(results[str(i)].sequences[0].tokens) == theirs.tolist()


@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("architecture", ["gemma3", "mistral", "qwen3", "qwen3_moe"])
def test_logprobs_are_the_trainers(
    architecture: str, n: int, store: ModelStore, trainer: TorchTrainer, tmp_path: Path
) -> None:
    """Of three adapters side by side, one of them saved to a folder and loaded, after steps."""
    sampler = TorchSampler(store)
    runs = [new_run(trainer, f"run-{i}", architecture, seed=i) for i in range(3)]
    for run_id in runs:
        result_of(trainer, job(run_id, [datum(s) for s in sequences(9, 30)]))
        trainer.optim_step(run_id, AdamParams(learning_rate=1e-2))
    for run_id in runs[:2]:
        sampler.publish(run_id, trainer.snapshot(run_id))
    trainer.save(runs[2], include_optimizer=True)(tmp_path)
    assert sampler.load(runs[2], architecture, tmp_path) == 1
    prompt = sequences(11, seed=4)[0]
    settings = {"temperature": 0.7, "max_tokens": 30, "n": n}
    jobs = [sample_job(prompt, run_id, weights_id=run_id, **settings) for run_id in runs]
    jobs.append(sample_job(prompt, "top-p", weights_id=runs[0], top_p=0.8, **settings))
    results = finish(sampler, jobs)
    for name, run_id in [*zip(runs, runs, strict=True), ("top-p", runs[0])]:
        sampled = results[name].sequences[:6]
        assert {s.weights_version for s in sampled} == {1}
        policy = trainer_logprobs(trainer, run_id, prompt, sampled)
        compare(policy, [s.logprobs for s in sampled], 1e-4)
        if name != "top-p":
            tempered = trainer_logprobs(trainer, run_id, prompt, sampled, temperature=0.7)
            compare(tempered, [s.sampling_logprobs for s in sampled], 1e-4)


def test_penalties_and_biases_are_of_what_the_sample_has(
    store: ModelStore, trainer: TorchTrainer
) -> None:
    """Step by step, in float64, from the trainer's log-probabilities, which are logits but for a
    constant; the prompt's own tokens are not counted."""
    run_id = new_run(trainer, architecture="qwen3")
    sampler = TorchSampler(store)
    sampler.publish("run", trainer.snapshot(run_id))
    prompt = sequences(12, seed=5)[0]
    settings = {"presence_penalty": 0.9, "frequency_penalty": 0.6, "logit_bias": {7: 3.0, 9: -2.0}}
    job_ = sample_job(prompt, weights_id="run", n=2, max_tokens=20, seed=1, **settings)
    for sequence in finish(sampler, [job_])["job"].sequences:
        assert len(sequence.tokens) == 20 or sequence.stop_reason == "stop"
        tokens = list(sequence.tokens)
        for t, token in enumerate(tokens):
            policy = all_logprobs(trainer, run_id, [*prompt, *tokens[:t]])
            assert sequence.logprobs[t] == pytest.approx(policy[token], abs=1e-4)
            shifted = policy.copy()
            shifted[7] += 3.0
            shifted[9] -= 2.0
            for each in set(tokens[:t]):
                shifted[each] -= 0.9 + 0.6 * tokens[:t].count(each)
            drawn = shifted - np.log(np.exp(shifted).sum())
            assert sequence.sampling_logprobs[t] == pytest.approx(drawn[token], abs=1e-4)


def all_logprobs(trainer: TorchTrainer, run_id: str, tokens: Sequence[int]) -> np.ndarray:
    """[V] of what follows `tokens`."""
    datums = [datum([*tokens, token]) for token in range(VOCAB)]
    result = result_of(trainer, job(run_id, datums, backward=False))
    return np.array([o["logprobs"].to_numpy()[-1] for o in result.loss_fn_outputs], dtype=float)


def trainer_logprobs(
    trainer: TorchTrainer,
    run_id: str,
    prompt: Sequence[int],
    sampled: Sequence[SampledSequence],
    **config: float,
) -> list[np.ndarray]:
    datums = [datum([*prompt, *s.tokens]) for s in sampled]
    result = result_of(trainer, job(run_id, datums, config=config, backward=False))
    outputs = [o["logprobs"].to_numpy() for o in result.loss_fn_outputs]
    return [o[len(prompt) - 1 :] for o in outputs]


def compare(ours: Sequence[object], theirs: Sequence[object], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


@pytest.mark.parametrize("read", [7, 512])
def test_prompt_logprobs_are_the_trainers(
    store: ModelStore, trainer: TorchTrainer, read: int
) -> None:
    run_id = new_run(trainer, architecture="mistral")
    sampler = TorchSampler(store, prefill_tokens=read)
    sampler.publish("run", trainer.snapshot(run_id))
    prompts = sequences(1, 2, 23, 90)
    jobs = [
        sample_job(p, str(i), weights_id="run", n=i % 2, prompt_logprobs=True)
        for i, p in enumerate(prompts)
    ]
    results = finish(sampler, jobs)
    for i, prompt in enumerate(prompts):
        scores = results[str(i)].prompt_logprobs
        assert scores is not None and scores[0] is None
        assert len(results[str(i)].sequences) == i % 2
        if len(prompt) > 1:
            (expected,) = result_of(
                trainer, job(run_id, [datum(prompt)], backward=False)
            ).loss_fn_outputs
            compare([expected["logprobs"]], [np.array(scores[1:], dtype=np.float64)], 1e-4)


def crowd(trainer: TorchTrainer, sampler: TorchSampler) -> list[SampleJob]:
    """Twelve jobs of three adapters and the base, of many lengths and kinds."""
    sampler.load("base", "mistral", None)
    weights = ["base"]
    for i in range(3):
        run_id = new_run(trainer, f"run-{i}", "mistral", seed=i)
        sampler.publish(run_id, trainer.snapshot(run_id))
        weights.append(run_id)
    kinds = [{"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    return [
        sample_job(
            prompt,
            str(i),
            weights_id=weights[i % 4],
            n=1 + i % 5,
            seed=i,
            max_tokens=5 + 5 * (i % 7),
            prompt_logprobs=i % 3 == 0,
            **kinds[i % 3],
        )
        for i, prompt in enumerate(sequences(*range(1, 97, 8), seed=8))
    ]


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_answer_does_not_depend_on_what_shares_the_batch(
    deterministic: bool, store: ModelStore, trainer: TorchTrainer
) -> None:
    """Within 2e-5, or exactly in deterministic mode, also when rows and cache are short."""
    sampler = TorchSampler(store, prefill_tokens=32, deterministic=deterministic)
    jobs = crowd(trainer, sampler)
    alone = {name: r for j in jobs for name, r in finish(sampler, [j]).items()}
    together = finish(sampler, jobs)
    assert_same(alone, together, exactly=deterministic)
    short = TorchSampler(
        store, prefill_tokens=32, deterministic=deterministic, max_rows=5, cache_bytes=400 * 256
    )
    crowd(trainer, short)
    scarce = {name: r for j in jobs for name, r in finish(short, [j]).items()}
    assert_same(scarce, finish(short, jobs[::-1]), exactly=deterministic)


def assert_same(a: dict[str, SampleResult], b: dict[str, SampleResult], *, exactly: bool) -> None:
    assert a.keys() == b.keys()
    if exactly:
        assert a == b
        return
    for name in a:
        for x, y in zip(a[name].sequences, b[name].sequences, strict=True):
            assert (x.tokens, x.text, x.stop_reason) == (y.tokens, y.text, y.stop_reason)
            compare([x.logprobs, x.sampling_logprobs], [y.logprobs, y.sampling_logprobs], 2e-5)


def test_a_seed_repeats_each_sample_whatever_their_number(store: ModelStore) -> None:
    sampler = TorchSampler(store)
    sampler.load("base", "llama", None)
    prompt = sequences(6)[0]

    def tokens(n: int, **params: int) -> list[tuple[int, ...]]:
        (result,) = finish(sampler, [sample_job(prompt, n=n, **params)]).values()
        return [s.tokens for s in result.sequences]

    eight = tokens(8, seed=5)
    assert tokens(3, seed=5) == eight[:3]
    assert tokens(100, seed=5)[:8] == eight
    assert len(set(eight)) == 8
    assert tokens(2, seed=6) != eight[:2]
    assert tokens(2) != tokens(2)
