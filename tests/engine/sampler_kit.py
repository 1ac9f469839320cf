"""What the sampler's tests share: a tokenizer for the tiny models, jobs, and running them."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.engine.conftest import VOCAB
from weaver.engine.base import SampleJob
from weaver.types import SampleResult, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from weaver.engine.torch.sampler import TorchSampler
    from weaver.tensors import TensorData

SPECIAL = ["<pad>", "<s>", "</s>"]
LETTERS = (string.ascii_lowercase + string.digits + string.ascii_uppercase)[: VOCAB - len(SPECIAL)]


def save_tokenizer(folder: Path) -> None:
    """One letter a token; ids 0 to 2 are special."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def sample_job(
    prompt: Sequence[int],
    job_id: str = "job",
    *,
    weights_id: str = "base",
    n: int = 1,
    prompt_logprobs: bool = False,
    stream: bool = False,
    top_logprobs: int = 0,
    prompt_top_logprobs: int = 0,
    prompt_targets: TensorData | None = None,
    **params: Any,
) -> SampleJob:
    return SampleJob(
        job_id=job_id,
        weights_id=weights_id,
        prompt=prompt,
        params=SamplingParams(**{"max_tokens": 12, **params}),
        num_samples=n,
        include_prompt_logprobs=prompt_logprobs,
        top_logprobs=top_logprobs,
        prompt_top_logprobs=prompt_top_logprobs,
        prompt_targets=prompt_targets,
        stream=stream,
    )


def finish(sampler: TorchSampler, jobs: Iterable[SampleJob] = ()) -> dict[str, SampleResult]:
    """Adds the jobs and steps until nothing is left; every job ends once, with a result."""
    for job in jobs:
        sampler.add(job)
    results: dict[str, SampleResult] = {}
    while sampler.busy:
        for progress in sampler.step():
            assert progress.error is None, progress.error
            if progress.result is not None:
                assert progress.job_id not in results
                results[progress.job_id] = progress.result
    assert_empty(sampler)
    return results


def assert_empty(sampler: TorchSampler) -> None:
    """No row, reservation or cache is left."""
    assert (sampler._admission.rows, sampler._admission.held_bytes) == (0, 0)
    assert not sampler._groups and not sampler._jobs and not sampler._reader._prompts
