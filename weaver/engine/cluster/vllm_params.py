"""What vLLM is told: of its engine as it starts, of a job as plain values; and what it cannot do.

Called by `SamplerPool` and by who makes one. vLLM only draws tokens: texts, stop strings and what
ends a sample are `SampleRun`'s, so that they are the same whichever engine draws.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from weaver.errors import ConfigError, UnsupportedError
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from weaver.engine.base import SampleJob
    from weaver.engine.cluster.sampled_model import SampledModel

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks of adapters that vLLM can be started with."""
ADAPTERS = 8
"""Different adapters in one of its steps; further ones take turns."""
KEPT_ADAPTERS = 64
"""In the memory of its host; others are read again from their folders."""
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
SHAPING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
"""What changes the distribution that is drawn from. vLLM has the same, in the same order but for
min-p, which it applies before top-k and top-p."""
CPU_CACHE_BYTES = 2**30
OWN_SHARE, BESIDE_SHARE = 0.9, 0.4
"""Of a GPU's memory, of its own or the trainer's, too."""
VARIABLES = {
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}
"""Of a worker's environment. A prompt may fill the context, and vLLM always draws one token more;
trainer and worker share the cores of a CPU; the sampler that tells both log-probabilities is that
of the first model runner."""


def engine_arguments(
    model: SampledModel,
    *,
    dtype: str,
    on_cpu: bool,
    alone: bool,
    rows: int,
    cache_bytes: int,
    max_rank: int,
) -> dict[str, Any]:
    """Of vLLM's `AsyncEngineArgs`.

    Args:
        dtype: `float32` or `bfloat16`.
        alone: no trainer is on the same GPU.
        rows: samples at once; 0 is 64 on a CPU, else 256.
        cache_bytes: for keys and values; 0: 1 GiB on a CPU, else a share of what is there.
        max_rank: see `rank_bound`.
    """
    cache: dict[str, Any] = {"gpu_memory_utilization": OWN_SHARE if alone else BESIDE_SHARE}
    if cache_bytes or on_cpu:
        cache["kv_cache_memory_bytes"] = cache_bytes or CPU_CACHE_BYTES
    return cache | {
        "model": model.source,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": on_cpu,
        "max_model_len": model.context_length + 1,
        "max_num_seqs": rows or (64 if on_cpu else 256),
        "enable_lora": True,
        "max_loras": ADAPTERS,
        "max_cpu_loras": KEPT_ADAPTERS,
        "max_lora_rank": max_rank,
        "disable_log_stats": True,
        "seed": 0,
    }


def rank_bound(rank: int) -> int:
    """The least that vLLM can be started with and takes adapters of this rank.

    Raises:
        ConfigError: it takes none.
    """
    for bound in RANKS:
        if bound >= rank:
            return bound
    raise ConfigError(
        f"is {rank}, vLLM takes adapters of rank {RANKS[-1]} at most.",
        field="sampler_max_rank",
        hint="Make it smaller.",
    )


def check_job(job: SampleJob, *, both: bool) -> None:
    """Raises UnsupportedError: vLLM has no equivalent of something that it asks for.

    `both`: it tells log-probabilities before and after temperature and filters; else only what
    makes them equal can be asked for.
    """

    def refuse(field: str, what: str, hint: str) -> UnsupportedError:
        return UnsupportedError(f"{what}, sampled by vLLM.", field=f"params.{field}", hint=hint)

    for name in ("top_logprobs", "prompt_top_logprobs", "prompt_targets"):
        if getattr(job, name):
            raise UnsupportedError(
                "is not told by the sampler's workers.",
                field=name,
                hint="Leave it out, or sample with torch.",
            )
    params = job.params
    check_structure(params)
    temperature = params.temperature
    if temperature and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        bounds = f"is {temperature}, outside of {LEAST_TEMPERATURE} to {MOST_TEMPERATURE}"
        raise refuse("temperature", bounds, "Use one of those, or 0.")
    if params.min_p and params.top_p < 1:
        what = "is used together with top_p, whose order differs"
        raise refuse("min_p", what, "Leave out one of them.")
    plain = SamplingParams()
    changed = [name for name in SHAPING if getattr(params, name) != getattr(plain, name)]
    if changed and temperature and not both:
        what = "needs `sampling_logprobs` other than `logprobs`, which these workers do not tell"
        raise refuse(changed[0], what, "Leave it out, or sample with temperature 0.")


def check_structure(params: SamplingParams) -> None:
    """Raises UnsupportedError: the text is to keep to a schema or a grammar."""
    for name in ("json_schema", "grammar"):
        if getattr(params, name) is not None:
            raise UnsupportedError(
                "is not kept to by the sampler's workers.",
                field=f"params.{name}",
                hint="Leave it out, or sample with torch.",
            )


def sampling_arguments(
    params: SamplingParams, *, length: int, stop_token_ids: frozenset[int], score: bool
) -> dict[str, Any]:
    """Of vLLM's `SamplingParams`, for each sample of a job.

    Args:
        length: the most tokens of a sample, 1 where none is wanted.
        stop_token_ids: all that end one, the model's own with them.
        score: the prompt's tokens, too.
    """
    return {
        **{name: getattr(params, name) for name in SHAPING},
        "top_k": max(params.top_k, 0),
        "logit_bias": [list(pair) for pair in params.logit_bias],
        "max_tokens": length,
        "stop_token_ids": sorted(stop_token_ids),
        "ignore_eos": True,
        "prompt_logprobs": 0 if score else None,
    }


def seeds_of(seed: int, count: int) -> list[int]:
    """One for each sample; sample i's is the same for any number of samples above i."""

    def one(index: int) -> int:
        digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    return [one(i) for i in range(count)]
