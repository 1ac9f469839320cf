"""Scores of published reward models, beside samples of other weights; and who has none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.engine.conftest import DEVICE, new_run, of_the_cpu, result_of, sequences
from tests.engine.sampler_kit import assert_empty, finish, sample_job, save_tokenizer
from tests.engine.test_scalar import SCALAR, pairs, scalar_job, scores_of
from weaver.engine.cluster.weights import Adapter
from weaver.engine.torch.lora import SCORE_WEIGHT
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import NonFiniteError, UnsupportedError
from weaver.heads import lengths_together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from weaver.engine.base import SampleJob
    from weaver.engine.torch.model_store import ModelStore

PROMPTS = sequences(5, 120, 17, 120)
PROMPTS[3] = [*PROMPTS[1][:90], *PROMPTS[3][90:]]


def score_job(prompt: Sequence[int], job_id: str) -> SampleJob:
    return replace(sample_job(prompt, job_id, weights_id="rewards", n=0), score=True)


@pytest.fixture
def sampler(store: ModelStore, model_folder: Callable[[str], Path]) -> TorchSampler:
    """It has `rewards`, of a run that `trained` has as well, and the base model's weights."""
    save_tokenizer(model_folder("qwen3"))
    sampler = TorchSampler(store, prefill_tokens=16)
    sampler.publish("rewards", trained(store).snapshot("run"))
    sampler.load("base", "qwen3", None)
    return sampler


def trained(store: ModelStore) -> TorchTrainer:
    trainer = TorchTrainer(store)
    new_run(trainer, config=SCALAR)
    return trainer


def test_scores_are_the_trainers_beside_samples_of_other_weights(
    store: ModelStore, sampler: TorchSampler
) -> None:
    datums = [one.model_copy(update={"loss_fn_inputs": {}}) for one in pairs(5, 40, 17, 40)]
    data = [d.model_copy(update={"loss_fn_inputs": {"surrogate_weights": _ZERO}}) for d in datums]
    wanted = scores_of(
        result_of(trained(store), scalar_job("run", data, "surrogate", backward=False))
    )
    texts = [d.model_input.to_ints() for d in datums]
    jobs = [score_job(text, str(i)) for i, text in enumerate([*texts, texts[0], texts[1]])]
    done = finish(sampler, [*jobs, sample_job(PROMPTS[0], "sample", max_tokens=3)])
    found = [done[str(i)].score for i in range(6)]
    np.testing.assert_allclose(np.array(found, float), [*wanted, wanted[0], wanted[1]], atol=2e-5)
    assert done["sample"].score is None and len(done["sample"].sequences) == 1
    assert not done["0"].sequences


def test_what_begins_alike_is_read_once(sampler: TorchSampler) -> None:
    one = finish(sampler, [score_job(PROMPTS[3], "alone")])["alone"].score
    before = sampler.counts["reused_prompt_tokens"]
    finish(sampler, [score_job(PROMPTS[1], "other")])
    again = finish(sampler, [score_job(PROMPTS[3], "again")])["again"].score
    assert sampler.counts["reused_prompt_tokens"] > before
    assert again == pytest.approx(one, abs=2e-5)


def test_a_score_that_is_not_finite_fails_every_job_that_asks_for_it(
    store: ModelStore, sampler: TorchSampler
) -> None:
    trainer = trained(store)
    trainer._run("run").named_parameters()[SCORE_WEIGHT].data.fill_(3e38)
    sampler.publish("rewards", trainer.snapshot("run"))
    for job_id in ("first", "same"):
        sampler.add(score_job(PROMPTS[0], job_id))
    failed = []
    while sampler.busy:
        failed += [(p.job_id, p.error) for p in sampler.step()]
    assert sorted(job_id for job_id, _ in failed) == ["first", "same"]
    assert all(isinstance(error, NonFiniteError) for _, error in failed)
    assert_empty(sampler)
    trainer._run("run").named_parameters()[SCORE_WEIGHT].data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="score"):
        sampler.publish("broken", trainer.snapshot("run"))


@of_the_cpu
def test_bfloat16_bases_keep_the_head_in_float32(store: ModelStore) -> None:
    small = type(store)(store.catalog, device=DEVICE, dtype=torch.bfloat16, threads=1)
    trainer = TorchTrainer(small)
    new_run(trainer, config=SCALAR)
    sampler = TorchSampler(small)
    sampler.publish("rewards", trainer.snapshot("run"))
    head = sampler._weights["rewards"].scalar
    assert head is not None and head.dtype == torch.float32
    found = finish(sampler, [score_job(PROMPTS[1], "job")])["job"].score
    exact = TorchSampler(store)
    exact.publish("rewards", trained(store).snapshot("run"))
    wanted = finish(exact, [score_job(PROMPTS[1], "job")])["job"].score
    assert found == pytest.approx(wanted, abs=0.5)


def test_vllm_is_given_none(store: ModelStore, tmp_path: Path) -> None:
    trained(store).save("run", include_optimizer=False)(tmp_path)
    with pytest.raises(UnsupportedError, match="reward model"):
        Adapter.read(tmp_path)


def test_both_sides_of_a_pair_have_to_fit_one_pass() -> None:
    assert lengths_together(pairs(5, 7, 9, 2), "bradley_terry") == [12, 12, 11, 11]
    assert lengths_together(pairs(5, 7), "surrogate") == [5, 7]


_ZERO = pairs(3, 4, surrogate_weights=[0.0])[0].loss_fn_inputs["surrogate_weights"]
