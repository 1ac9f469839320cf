"""The fake engine: its gradient is exact, its tokenizer loads, its samples obey."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.fake_engine import FakeEngine
from tests.fake_engine.model import BASE, EOS
from weaver.checks import check_loss
from weaver.engine.base import GradientJob, SampleJob
from weaver.types import AdamParams, Datum, ForwardBackwardResult, SampleResult, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = {"logprobs": [-3.0, -4.0, -3.5], "advantages": [1.0, -2.0, 0.5]}
LOSSES: dict[str, dict[str, list[float]]] = {
    "cross_entropy": {"weights": [0.5, 1.0, 2.0]},
    "importance_sampling": INPUTS,
    "ppo": INPUTS,
    "dro": INPUTS,
    "surrogate": {"surrogate_weights": [1.0, -2.0, 0.5]},
}
SEVERAL = {
    "target_tokens": [[6, 200], [7, 7], [200, 1]],
    "weights": [[0.5, 0.2], [1.0, 2.0], [0.0, 1.0]],
}


def job(loss_fn: str, *, temperature: float = 1.0, several: bool = False) -> GradientJob:
    inputs = SEVERAL if several else {"target_tokens": [6, 7, 200], **LOSSES[loss_fn]}
    datum = Datum(model_input=[5, 6, 7], loss_fn_inputs=inputs)
    return GradientJob(
        run_id="run",
        datums=[datum],
        loss_fn=loss_fn,
        loss_fn_config=check_loss(loss_fn, {"temperature": temperature}),
    )


def loss(engine: FakeEngine, of: GradientJob) -> float:
    (done,) = engine.trainer.forward_backward([of])
    assert isinstance(done, ForwardBackwardResult)
    return done.metrics["loss"]


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.trainer.create_run("run", "fake", training_mode="lora", lora_config=None, seed=0)
    return engine


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("loss_fn", "several"), [*((name, False) for name in LOSSES), ("cross_entropy", True)]
)
def test_the_gradient_is_the_slope_of_the_loss(
    engine: FakeEngine, loss_fn: str, several: bool, temperature: float
) -> None:
    run = engine.trainer._runs["run"]
    of = job(loss_fn, temperature=temperature, several=several)
    loss(engine, of)
    gradient = run.gradient
    assert gradient is not None
    for at in [(0, 6), (0, 200), (1, 1), (1, 193)]:
        values = []
        for sign in (1, -1):
            run.weights = BASE.copy()
            run.weights[at] += sign * 1e-5
            values.append(loss(engine, of))
        assert np.isclose((values[0] - values[1]) / 2e-5, gradient[at], rtol=1e-5, atol=1e-8)


def test_a_snapshot_never_changes(engine: FakeEngine) -> None:
    snapshot = engine.trainer.snapshot("run")
    before = snapshot.tensors["weight"].copy()
    loss(engine, job("cross_entropy"))
    engine.trainer.optim_step("run", AdamParams(learning_rate=0.1))
    assert np.array_equal(snapshot.tensors["weight"], before)
    assert not np.array_equal(engine.trainer.snapshot("run").tensors["weight"], before)


def test_transformers_loads_the_tokenizer(engine: FakeEngine, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in engine.tokenizer_files("fake").items():
        (tmp_path / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "héllo wörld\n\x00 €"
    assert tokenizer.encode(text) == list(text.encode()) == engine.encode("fake", text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == EOS


def sample(engine: FakeEngine, params: SamplingParams) -> SampleResult:
    engine.sampler.load("w", "fake", None)
    engine.sampler.add(
        SampleJob(job_id="j", weights_id="w", prompt=[104], params=params, num_samples=2)
    )
    while True:
        for progress in engine.sampler.step():
            if progress.result is not None:
                return progress.result


def test_samples_stop_where_they_are_told(engine: FakeEngine) -> None:
    free = sample(engine, SamplingParams(max_tokens=30, seed=1)).sequences[0]
    assert free.stop_reason == "length" and len(free.tokens) == 30
    stop = free.text[10:12]
    cut = free.text.index(stop)
    stopped = sample(engine, SamplingParams(max_tokens=30, seed=1, stop=stop)).sequences[0]
    assert stopped.stop_reason == "stop" and stopped.text == free.text[:cut]
    assert stopped.tokens == free.tokens[: cut + 2]
    token = free.tokens[5]
    by_token = sample(engine, SamplingParams(max_tokens=30, seed=1, stop_token_ids=[token]))
    assert by_token.sequences[0].tokens == free.tokens[: free.tokens.index(token) + 1]


def test_samples_follow_the_distribution(engine: FakeEngine) -> None:
    result = sample(engine, SamplingParams(max_tokens=3000, seed=2, temperature=1.0))
    counts = np.bincount(result.sequences[0].tokens, minlength=257)
    assert abs(counts[32:127].sum() / counts.sum() - 0.922) < 0.02
    assert result.sequences[0].tokens != result.sequences[1].tokens


def test_overlapping_calls_are_found(engine: FakeEngine) -> None:
    with engine.call("one", None), pytest.raises(RuntimeError, match="during another call"):
        engine.trainer.clear_gradients("run")
