"""What vLLM is told, and what is refused before it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.cluster.kit import MODEL, a_job
from weaver.engine.cluster.vllm_params import (
    RANKS,
    SHAPING,
    check_job,
    engine_arguments,
    rank_bound,
    sampling_arguments,
    seeds_of,
)
from weaver.errors import ConfigError, UnsupportedError
from weaver.types import SamplingParams

OTHERS = {"max_tokens", "stop", "stop_token_ids", "ignore_eos", "seed"}
REFUSED = {"json_schema", "grammar"}


def test_every_parameter_is_told_or_made_here() -> None:
    """A new one fails this until it is decided what becomes of it."""
    assert set(SHAPING) | OTHERS | REFUSED == set(SamplingParams.model_fields)
    params = SamplingParams(
        temperature=0.7, top_k=-1, top_p=0.9, presence_penalty=0.5, logit_bias={7: 1.5}
    )
    told = sampling_arguments(params, length=5, stop_token_ids=frozenset([3, 1]), score=True)
    assert told == {
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.0,
        "logit_bias": [[7, 1.5]],
        "max_tokens": 5,
        "stop_token_ids": [1, 3],
        "ignore_eos": True,
        "prompt_logprobs": 0,
    }


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 2.0, 0.0])
def test_temperatures_that_vllm_keeps_are_taken(temperature: float) -> None:
    check_job(a_job(temperature=temperature), both=True)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": 0.009}, "temperature"),  # it would be made 0.01
        ({"temperature": 2.1}, "temperature"),
        ({"min_p": 0.1, "top_p": 0.5}, "min_p"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"grammar": 'start: "yes"'}, "grammar"),
    ],
)
def test_what_vllm_does_otherwise_is_refused(params: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        check_job(a_job(**params), both=True)
    assert refused.value.field == f"params.{field}"


@pytest.mark.parametrize("name", ["top_logprobs", "prompt_top_logprobs", "prompt_targets"])
def test_what_workers_do_not_tell_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        check_job(replace(a_job(), **{name: 2}), both=True)
    assert refused.value.field == name


def test_ranks_are_bounded_by_those_that_vllm_knows() -> None:
    assert [rank_bound(rank) for rank in (1, 2, 8, 65, 512)] == [1, 8, 8, 128, 512]
    with pytest.raises(ConfigError, match="512"):
        rank_bound(RANKS[-1] + 1)


def test_the_cache_is_set_or_a_share_of_the_device() -> None:
    def told(**changes: Any) -> dict[str, Any]:
        how = {"on_cpu": False, "alone": True, "rows": 0, "cache_bytes": 0, **changes}
        return engine_arguments(MODEL, dtype="float32", max_rank=8, **how)

    assert "kv_cache_memory_bytes" not in told() and told()["gpu_memory_utilization"] == 0.9
    assert told(alone=False)["gpu_memory_utilization"] == 0.4
    assert told(cache_bytes=5)["kv_cache_memory_bytes"] == 5
    assert told(on_cpu=True)["kv_cache_memory_bytes"] == 2**30
    assert told()["max_model_len"] == 65 and told(rows=3)["max_num_seqs"] == 3


def test_seeds_are_apart_and_do_not_depend_on_their_number() -> None:
    seeds = [seed for start in range(50) for seed in seeds_of(start, 8)]
    assert len(set(seeds)) == 400 and 0 <= min(seeds) and max(seeds) < 2**63
    assert seeds_of(3, 8)[:2] == seeds_of(3, 2)
