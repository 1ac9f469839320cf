"""The contract of an engine's sampler beside its trainer: torch's own, and pools of workers.

`pool` has workers that stand in for vLLM's and compute with our own engine; `vllm` has vLLM's, in
the environment that `make test-cluster` makes. `cluster` trains in two ranks and samples by
stand-ins that Ray places, `vllm_cluster` by workers of vLLM that it places.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.engine.cluster.kit import a_job, begin, vllm_environment
from tests.engine.cluster.torch_standin import an_environment
from tests.engine.conftest import reference_model
from weaver.checks import check_datums
from weaver.config import load_settings
from weaver.engine.base import GradientJob, WeightsRef
from weaver.engine.local import open_engine
from weaver.engine.torch.catalog import NANO
from weaver.errors import (
    CheckpointCorruptError,
    ContextLengthError,
    InvalidParamsError,
    NotFoundError,
    UnsupportedError,
    WeaverError,
)
from weaver.types import AdamParams, Datum, ForwardBackwardResult, LoraConfig, ModelInput

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from weaver.config import Settings
    from weaver.engine.base import Engine
    from weaver.types import SampleResult

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

MODEL = "weaver-nano"
LORA = LoraConfig(rank=8, alpha=16.0)
PROMPT = list(b"reverse: hello world")
CLOSE = 1e-5
"""Nats, in float32, between a sampler and the trainer."""


@dataclass(frozen=True)
class Kind:
    name: str
    engine: Engine

    @property
    def pooled(self) -> bool:
        return self.name != "torch"


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("vllm", "cluster", "vllm_cluster")]
CLUSTER = """
address = "local"
[[trainer]]
model = "weaver-nano"
device = "cpu"
ranks = 2
cpus = 0.4
[[pool]]
model = "weaver-nano"
device = "cpu"
cpus = 0.1
rows = 16
cache_gb = 0.2
"""


@pytest.fixture(scope="module", params=["torch", "pool", *SLOW])
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kind]:
    given = {"WEAVER_HOME": str(tmp_path_factory.mktemp("home")), "WEAVER_KV_CACHE_GB": "0.2"}
    given |= {"WEAVER_DEVICE": "cpu", "WEAVER_SAMPLE_ROWS": "16"}
    if request.param != "torch":
        if request.param.startswith("vllm"):
            environment = vllm_environment()
        else:
            environment = an_environment(tmp_path_factory.mktemp("made") / "env")
        given |= {"WEAVER_SAMPLER": "vllm", "WEAVER_SAMPLER_ENV": str(environment)}
    open_it = _open_cluster if request.param.endswith("cluster") else open_engine
    engine = open_it(load_settings(given))
    yield Kind(request.param, engine)
    engine.close()


def _open_cluster(settings: Settings) -> Engine:
    pytest.importorskip("ray")
    from weaver.engine.cluster.pooled_cluster import open_cluster

    settings.home.mkdir(exist_ok=True)
    file = settings.home / "cluster.toml"
    file.write_text(CLUSTER)
    return open_cluster(settings, file=file, address=None)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engine(kind: Kind) -> AsyncIterator[Engine]:
    """With the base model published as `base`."""
    await kind.engine.publish("base", WeightsRef(base_model=MODEL))
    yield kind.engine
    for weights_id in ("base", "w", "v"):
        await kind.engine.release(weights_id)
    for run_id in ("run", "other"):
        with suppress(WeaverError):
            await kind.engine.delete_run(run_id)


def a_datum(tokens: Sequence[int]) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": list(tokens[1:])},
    )


async def pass_of(
    engine: Engine, run_id: str, tokens: Sequence[int], *, backward: bool
) -> ForwardBackwardResult:
    datums = [a_datum(tokens)]
    job = GradientJob(
        run_id=run_id,
        datums=datums,
        loss_fn="cross_entropy",
        loss_fn_config=check_datums(datums, "cross_entropy", config=None),
        backward=backward,
    )
    [done] = await engine.forward_backward([job])
    assert isinstance(done, ForwardBackwardResult), done
    return done


async def trained(engine: Engine, run_id: str = "run", text: bytes = b"abcdefgh") -> None:
    """A run whose adapter changes everything."""
    await engine.create_run(run_id, MODEL, training_mode="lora", lora_config=LORA, seed=3)
    for _ in range(2):
        await pass_of(engine, run_id, list(text), backward=True)
        [step] = await engine.optim_step([(run_id, AdamParams(learning_rate=0.02))])
        assert not isinstance(step, WeaverError), step


async def logprobs_of(engine: Engine, run_id: str, tokens: Sequence[int]) -> np.ndarray:
    """The trainer's of `tokens[1:]`, float64."""
    done = await pass_of(engine, run_id, tokens, backward=False)
    return np.asarray(done.loss_fn_outputs[0]["logprobs"], dtype=np.float64)


async def draw(engine: Engine, *args: Any, **params: Any) -> SampleResult:
    return await begin(engine, a_job(*args, **params)).result()


# --- numbers ------------------------------------------------------------------------------------


async def test_log_probabilities_are_the_trainers(engine: Engine) -> None:
    """Of two runs and the base in one batch: of the prompt, and of what was drawn."""
    await trained(engine)
    await trained(engine, "other", b"zyxwvuts")
    assert await engine.publish("w", await engine.snapshot("run")) == 2
    assert await engine.publish("v", await engine.snapshot("other")) == 2
    how: dict[str, Any] = {"n": 2, "prompt_logprobs": True, "ignore_eos": True, "max_tokens": 24}
    told = [begin(engine, a_job(PROMPT, w, weights_id=w, **how)) for w in ("w", "v", "base")]
    results = dict(zip(("run", "other", ""), [await t.result() for t in told], strict=True))
    scores = [result.prompt_logprobs for result in results.values()]
    assert len(set(scores)) == 3
    for run_id in ("run", "other"):
        result = results[run_id]
        assert result.prompt_logprobs is not None
        for sequence in result.sequences:
            expected = await logprobs_of(engine, run_id, [*PROMPT, *sequence.tokens])
            found = [*result.prompt_logprobs[1:], *sequence.logprobs]
            assert np.abs(np.array(found, dtype=np.float64) - expected).max() < CLOSE
            assert sequence.sampling_logprobs == pytest.approx(sequence.logprobs, abs=CLOSE)
            assert (len(sequence.tokens), sequence.weights_version) == (24, 2)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.8},
        {"top_k": 20, "top_p": 0.9, "temperature": 0.9},
        {"min_p": 0.05, "top_k": 10},
        {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4},
        {"logit_bias": {101: 2.0, 97: -3.0}, "temperature": 0.8},
        {"temperature": 0.0, "repetition_penalty": 1.2},
    ],
    ids=lambda params: "-".join(params),
)
async def test_what_is_drawn_comes_from_the_distribution_that_was_asked_for(
    engine: Engine, params: dict[str, Any]
) -> None:
    """Both log-probabilities of each token, against a computation of its own."""
    result = await draw(engine, PROMPT, n=3, max_tokens=8, ignore_eos=True, **params)
    for sequence in result.sequences:
        tokens = [*PROMPT, *sequence.tokens]
        logits = base_logits(tokens)[len(PROMPT) - 1 : -1]
        for at, token in enumerate(sequence.tokens):
            policy = log_softmax(logits[at])
            assert sequence.logprobs[at] == pytest.approx(policy[token], abs=2e-5)
            drawn = shaped(logits[at], tokens, drawn=sequence.tokens[:at], **params)
            assert sequence.sampling_logprobs[at] == pytest.approx(drawn[token], abs=5e-5)


@cache
def base_model() -> Any:
    return reference_model(NANO)


def base_logits(tokens: Sequence[int]) -> np.ndarray:
    """[T, V] float64, through transformers alone."""
    with torch.no_grad():
        logits: np.ndarray = base_model()(torch.tensor([list(tokens)])).logits[0].double().numpy()
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return np.array(shifted - np.log(np.exp(shifted).sum()))


def shaped(
    logits: np.ndarray,
    tokens: Sequence[int],
    *,
    drawn: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
) -> np.ndarray:
    """Log-probabilities [V] of what is drawn from, -inf of what is not."""
    z = logits.copy()
    for token, bias in (logit_bias or {}).items():
        z[token] += bias
    seen = list({*PROMPT, *drawn})
    z[seen] = np.where(z[seen] > 0, z[seen] / repetition_penalty, z[seen] * repetition_penalty)
    counts = np.bincount(np.array(drawn, dtype=int), minlength=len(z))
    z -= frequency_penalty * counts + presence_penalty * (counts > 0)
    if temperature == 0:
        return np.where(np.arange(len(z)) == z.argmax(), 0.0, -np.inf)
    z = z / temperature
    if top_k:
        z = np.where(z >= np.sort(z)[-top_k], z, -np.inf)
    if top_p < 1:
        order = np.argsort(-z)
        p = np.exp(log_softmax(z))[order]
        gone = order[(p.cumsum() - p) >= top_p]
        z[gone] = -np.inf
    if min_p:
        p = np.exp(log_softmax(z))
        z = np.where(p >= min_p * p.max(), z, -np.inf)
    return log_softmax(z)


# --- seeds, ends, streams -----------------------------------------------------------------------


async def test_a_seed_repeats_each_sample_whatever_shares_the_batch(engine: Engine) -> None:
    how: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "temperature": 0.9}
    alone = (await draw(engine, PROMPT, n=2, seed=5, **how)).sequences
    others = [begin(engine, a_job([65 + i] * 9, f"o{i}", seed=i, **how)) for i in range(4)]
    beside = (await draw(engine, PROMPT, "again", n=3, seed=5, **how)).sequences
    for told in others:
        await told.result()
    assert [s.tokens for s in beside[:2]] == [s.tokens for s in alone]
    assert len({s.tokens for s in beside}) == 3


async def test_a_sample_ends_at_a_stop_a_token_the_length_or_the_context(engine: Engine) -> None:
    letters = {token: -100.0 for token in range(256, 262)}
    how: dict[str, Any] = {"seed": 3, "max_tokens": 24, "logit_bias": letters}
    [plain] = (await draw(engine, PROMPT, **how)).sequences
    assert (plain.stop_reason, len(plain.tokens)) == ("length", 24)
    for stop in (plain.text[6:9], plain.text[10:11]):
        [stopped] = (await draw(engine, PROMPT, stop=stop, **how)).sequences
        cut = plain.text.index(stop)
        assert (stopped.stop_reason, stopped.text) == ("stop", plain.text[:cut])
        assert plain.tokens[: len(stopped.tokens)] == stopped.tokens
    token = plain.tokens[7]
    [ended] = (await draw(engine, PROMPT, stop_token_ids=[token], **how)).sequences
    assert ended.tokens == plain.tokens[: plain.tokens.index(token) + 1]
    assert ended.stop_reason == "stop"
    [own] = (await draw(engine, PROMPT, seed=3, max_tokens=200)).sequences
    assert (own.stop_reason, own.tokens[-1]) == ("stop", 256) and 256 not in own.tokens[:-1]
    [long] = (await draw(engine, [65] * 1021, seed=1, max_tokens=30, ignore_eos=True)).sequences
    assert (long.stop_reason, len(long.tokens)) == ("length", 3)


async def test_streamed_pieces_make_up_the_result(engine: Engine) -> None:
    job = a_job(PROMPT, n=3, seed=2, max_tokens=25, stop=["e", "or"], stream=True)
    told = begin(engine, job)
    result = await told.result()
    for index, sequence in enumerate(result.sequences):
        deltas = [delta for delta in told.deltas if delta.index == index]
        assert "".join(delta.text for delta in deltas) == sequence.text
        assert tuple(t for delta in deltas for t in delta.tokens) == sequence.tokens
        assert tuple(x for delta in deltas for x in delta.logprobs) == sequence.logprobs
        assert [d.stop_reason for d in deltas if d.stop_reason] == [sequence.stop_reason]


async def test_a_prompt_is_scored_alone_up_to_the_whole_context(engine: Engine) -> None:
    score = partial(draw, engine, n=0, prompt_logprobs=True)
    result = await score(PROMPT)
    assert result.sequences == () and result.prompt_tokens == tuple(PROMPT)
    assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
    logits = base_logits(PROMPT)
    expected = [log_softmax(logits[i])[t] for i, t in enumerate(PROMPT[1:])]
    assert result.prompt_logprobs[1:] == pytest.approx(expected, abs=2e-5)
    full = await score([65 + i % 26 for i in range(1024)])
    assert full.prompt_logprobs is not None and len(full.prompt_logprobs) == 1024
    assert (await score([65])).prompt_logprobs == (None,)
    error = await begin(engine, a_job([65] * 1024)).error()
    assert isinstance(error, ContextLengthError) and error.field == "prompt"


# --- weights ------------------------------------------------------------------------------------


async def test_weights_stay_as_they_were_published(engine: Engine) -> None:
    await trained(engine)
    await engine.publish("w", await engine.snapshot("run"))
    how: dict[str, Any] = {"seed": 1, "max_tokens": 8, "ignore_eos": True}
    before = await draw(engine, PROMPT, weights_id="w", **how)
    await pass_of(engine, "run", list(b"hgfedcba"), backward=True)
    await engine.optim_step([("run", AdamParams(learning_rate=0.05))])
    await engine.publish("v", await engine.snapshot("run"))
    assert await draw(engine, PROMPT, weights_id="w", **how) == before
    after = await draw(engine, PROMPT, weights_id="v", **how)
    assert after.sequences[0].logprobs != before.sequences[0].logprobs
    assert after.sequences[0].weights_version == 3


async def test_a_checkpoint_is_sampled_and_may_be_deleted(engine: Engine, tmp_path: Path) -> None:
    await trained(engine)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (await engine.save("run", include_optimizer=True))(folder)
    ref = WeightsRef(base_model=MODEL, uri=folder.as_uri())
    assert await engine.publish("w", ref) == 2
    for file in folder.iterdir():
        file.unlink()
    how: dict[str, Any] = {"n": 0, "prompt_logprobs": True}
    score = (await draw(engine, PROMPT, weights_id="w", **how)).prompt_logprobs
    await engine.publish("v", await engine.snapshot("run"))
    assert score is not None
    again = (await draw(engine, PROMPT, weights_id="v", **how)).prompt_logprobs
    assert again is not None and again[1:] == pytest.approx(score[1:], abs=CLOSE)


async def test_released_weights_are_gone_for_new_jobs_only(engine: Engine) -> None:
    await trained(engine)
    await engine.publish("w", await engine.snapshot("run"))
    how: dict[str, Any] = {"weights_id": "w", "ignore_eos": True}
    told = begin(engine, a_job(PROMPT, max_tokens=200, **how))
    await engine.release("w")
    await engine.release("w")
    assert len((await told.result()).sequences[0].tokens) == 200
    error = await begin(engine, a_job(PROMPT, **how)).error()
    assert isinstance(error, NotFoundError) and error.field == "weights_id"


async def test_a_folder_with_numbers_that_are_not_finite_is_not_published(
    engine: Engine, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    await trained(engine)
    (await engine.save("run", include_optimizer=False))(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointCorruptError, match="not finite"):
        await engine.publish("w", WeightsRef(base_model=MODEL, uri=tmp_path.as_uri()))


async def test_a_dropped_job_is_told_nothing(engine: Engine) -> None:
    told = begin(engine, a_job(PROMPT, "dropped", n=4, max_tokens=900, ignore_eos=True))
    told.drop()
    told.drop()
    assert await draw(engine, PROMPT, "next", max_tokens=4)
    assert told.progress == []


# --- what a pool cannot sample is refused before it is trained ----------------------------------


async def test_what_could_not_be_sampled_is_not_made(kind: Kind, engine: Engine) -> None:
    if not kind.pooled:
        pytest.skip("torch samples all that it trains")
    create = partial(engine.create_run, "refused", MODEL, seed=0)
    with pytest.raises(UnsupportedError) as refused:
        await create(training_mode="full_ft", lora_config=None)
    assert refused.value.field == "training_mode"
    with pytest.raises(InvalidParamsError) as too_large:
        await create(training_mode="lora", lora_config=LoraConfig(rank=65))
    assert too_large.value.field == "lora_config.rank"
    with pytest.raises(WeaverError):
        await engine.clear_gradients("refused")
