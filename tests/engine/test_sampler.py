"""How the sampler queues, shares, ends, cancels and refuses; on tiny random models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.conftest import ARCHITECTURES, new_run, reference_model, sequences
from tests.engine.sampler_kit import (
    LETTERS,
    SPECIAL,
    assert_empty,
    finish,
    sample_job,
    save_tokenizer,
)
from tests.optional import given, peft, settings, st
from weaver.engine.torch.sampler import TorchSampler
from weaver.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ContextLengthError,
    NonFiniteError,
    NotFoundError,
    UnknownModelError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.base import SampleProgress
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.trainer import TorchTrainer
    from weaver.errors import WeaverError
    from weaver.types import TrainingMode

# PEFT reads a deprecated attribute of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONTEXT = 256
"""Of the tiny models."""
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Of keys and values, 2 layers, 2 heads of 8 numbers."""
LARGEST_ARENA = 256
"""Tokens that a row of up to 90 + 70 takes."""


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(model_folder: Callable[[str], Path]) -> None:
    for name in ARCHITECTURES:
        save_tokenizer(model_folder(name))


@pytest.fixture
def sampler(store: ModelStore) -> TorchSampler:
    sampler = TorchSampler(store)
    sampler.load("base", "llama", None)
    return sampler


def text_of(tokens: tuple[int, ...]) -> str:
    return "".join(LETTERS[t - len(SPECIAL)] for t in tokens if t >= len(SPECIAL))


def one(sampler: TorchSampler, prompt: list[int], **settings: Any) -> Any:
    (result,) = finish(sampler, [sample_job(prompt, **settings)]).values()
    return result.sequences[0]


# --- ends ---------------------------------------------------------------------------------------


def test_a_sequence_ends_at_a_stop_a_token_the_length_or_the_context(sampler: TorchSampler) -> None:
    prompt = sequences(5)[0]
    seed = next(
        i for i in range(99) if len(one(sampler, prompt, max_tokens=30, seed=i).tokens) > 29
    )
    plain = one(sampler, prompt, max_tokens=30, seed=seed)
    text = text_of(plain.tokens)
    assert (plain.stop_reason, len(plain.tokens), plain.text) == ("length", 30, text)
    stopped = one(sampler, prompt, max_tokens=30, seed=seed, stop=text[10:13])
    cut = text.index(text[10:13])
    assert (stopped.stop_reason, stopped.text) == ("stop", text[:cut])
    assert stopped.tokens == plain.tokens[: cut + 3]
    last = plain.tokens[7]
    by_token = one(sampler, prompt, max_tokens=30, seed=seed, stop_token_ids=[last])
    first = plain.tokens.index(last)
    assert (by_token.stop_reason, by_token.text) == ("stop", text[:first])
    assert by_token.tokens == plain.tokens[: first + 1]
    long = one(sampler, sequences(CONTEXT - 3)[0], max_tokens=30, seed=2, stop_token_ids=[])
    assert (long.stop_reason, len(long.tokens)) == ("length", 3)


def test_the_models_end_of_sequence_ends_a_sequence(sampler: TorchSampler) -> None:
    (result,) = finish(sampler, [sample_job([5], n=40, seed=0, max_tokens=200)]).values()
    ended = [s for s in result.sequences if s.stop_reason == "stop"]
    assert ended
    for s in ended:
        assert s.tokens[-1] == 2 and 2 not in s.tokens[:-1]
        assert s.text == text_of(s.tokens[:-1])
    for s in result.sequences:
        assert len(s.tokens) == len(s.logprobs) == len(s.sampling_logprobs)


def test_streamed_pieces_make_up_the_result(sampler: TorchSampler) -> None:
    job = sample_job([5, 6], n=3, seed=3, max_tokens=25, stop=["a", "bc"], stream=True)
    sampler.add(job)
    progress: list[SampleProgress] = []
    while sampler.busy:
        progress += sampler.step()
    (result,) = [p.result for p in progress if p.result]
    for index, sequence in enumerate(result.sequences):
        deltas = [d for p in progress for d in p.deltas if d.index == index]
        assert "".join(d.text for d in deltas) == sequence.text
        assert tuple(t for d in deltas for t in d.tokens) == sequence.tokens
        assert tuple(x for d in deltas for x in d.logprobs) == sequence.logprobs
        assert [d.stop_reason for d in deltas if d.stop_reason] == [sequence.stop_reason]
        assert deltas[-1].stop_reason


# --- sharing ------------------------------------------------------------------------------------


def test_a_prompt_is_read_once_for_all_samples_and_a_step_is_one_call(
    sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sampler._store.base("llama")
    rows: list[int] = []
    forward = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda batch: rows.append(len(batch.input_ids)) or forward(batch)
    )
    finish(sampler, [sample_job([5] * 20, n=8, max_tokens=4, stop_token_ids=[], seed=11)])
    assert rows[0] == 20
    assert len(rows) <= 4 and max(rows[1:]) <= 8


def test_a_long_prompt_does_not_stall_running_rows(store: ModelStore) -> None:
    sampler = TorchSampler(store, prefill_tokens=8)
    sampler.load("base", "llama", None)
    sampler.add(sample_job([5], "short", temperature=0.0, max_tokens=60, stream=True))
    sampler.step()
    sampler.add(sample_job(sequences(80)[0], "long", max_tokens=1))
    steps = [sampler.step() for _ in range(20)]
    read = next(i for i, s in enumerate(steps) if any(p.job_id == "long" for p in s))
    grown = sum(p.job_id == "short" for s in steps[:read] for p in s)
    assert read in (16, 17) and grown >= 8


def test_jobs_take_turns_in_order_and_large_ones_run_in_waves(store: ModelStore) -> None:
    sampler = TorchSampler(store, max_rows=4)
    sampler.load("base", "llama", None)
    sampler.add(sample_job([5], "large", n=11, max_tokens=6))
    sampler.add(sample_job([6], "small", max_tokens=1))
    ended: list[str] = []
    while sampler.busy:
        ended += [p.job_id for p in sampler.step() if p.result]
        assert sampler._admission.rows <= 4
        assert sum(len(group.rows) for group in sampler._groups.values()) <= 4
    assert sorted(ended) == ["large", "small"]
    assert_empty(sampler)


def test_base_models_and_full_snapshots_step_in_turn(
    store: ModelStore, trainer: TorchTrainer, tmp_path: Path
) -> None:
    run_id = new_run(trainer, "full", "qwen2", training_mode="full_ft")
    with torch.no_grad():
        for parameter in trainer._run(run_id).parameters():
            parameter.mul_(1.1)
    sampler = TorchSampler(store)
    sampler.load("llama", "llama", None)
    sampler.load("qwen2", "qwen2", None)
    sampler.publish("full", trainer.snapshot(run_id))
    trainer.save(run_id, include_optimizer=False)(tmp_path)
    sampler.load("folder", "qwen2", tmp_path)
    names = ["llama", "qwen2", "full", "folder"]
    jobs = [
        sample_job([5, 6, 7], w, weights_id=w, temperature=0.0, prompt_logprobs=True) for w in names
    ]
    results = finish(sampler, jobs)
    assert results["full"].prompt_logprobs != results["qwen2"].prompt_logprobs
    assert results["folder"] == results["full"]
    logits = reference_model(tmp_path)(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    expected = [logits[0, 6].item(), logits[1, 7].item()]
    assert results["full"].prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)  # type: ignore[index]


def test_running_jobs_keep_their_weights_after_release_and_replacement(
    sampler: TorchSampler, trainer: TorchTrainer
) -> None:
    run_id = new_run(trainer, architecture="llama")
    job = sample_job([5, 6], weights_id="w", temperature=0.0)
    sampler.publish("w", trainer.snapshot(run_id))
    expected = finish(sampler, [job])
    sampler.add(job)
    sampler.step()
    sampler.load("w", "llama", None)
    assert finish(sampler) == expected
    sampler.add(replace(job, weights_id="base"))
    sampler.step()
    sampler.release("w")
    sampler.release("w")
    assert finish(sampler) != expected
    with pytest.raises(NotFoundError, match="no weights 'w'"):
        sampler.add(job)
    assert not sampler.busy


def test_a_snapshot_is_not_changed_by_later_steps(
    sampler: TorchSampler, trainer: TorchTrainer
) -> None:
    run_id = new_run(trainer, architecture="llama")
    sampler.publish("w", trainer.snapshot(run_id))
    job = sample_job([5, 6], weights_id="w", temperature=0.0)
    before = finish(sampler, [job])
    with torch.no_grad():
        for parameter in trainer._run(run_id).parameters():
            parameter.add_(1.0)
    assert finish(sampler, [job]) == before


# --- cancellation and order ---------------------------------------------------------------------

ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 90), st.sampled_from([0, 1, 2, 5, 9]), st.integers(1, 70)
        ),
        st.tuples(st.just("cancel"), st.integers(0, 7)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(
    actions=ACTIONS,
    max_rows=st.integers(1, 6),
    cache_tokens=st.integers(1, 500),
    deterministic=st.booleans(),
)
def test_any_interleaving_ends_every_job_once_and_leaks_nothing(
    store: ModelStore,
    actions: list[tuple[Any, ...]],
    max_rows: int,
    cache_tokens: int,
    deterministic: bool,
) -> None:
    sampler = TorchSampler(
        store,
        max_rows=max_rows,
        cache_bytes=cache_tokens * TOKEN_BYTES,
        prefill_tokens=24,
        deterministic=deterministic,
    )
    sampler.load("base", "llama", None)
    sampler.load("other", "qwen2", None)
    open_jobs: dict[str, int] = {}

    def step() -> None:
        for progress in sampler.step():
            assert progress.error is None
            if progress.result is not None:
                assert len(progress.result.sequences) == open_jobs.pop(progress.job_id)
        held = sampler._admission
        assert 0 <= held.rows <= max_rows
        alone = 90 + LARGEST_ARENA * max_rows
        assert 0 <= held.held_bytes <= max(cache_tokens, alone) * TOKEN_BYTES
        assert sum(len(g.rows) for g in sampler._groups.values()) <= held.rows

    for number, (action, *values) in enumerate(actions):
        if action == "add":
            length, n, max_tokens = values
            weights = ("base", "other")[number % 2]
            job = sample_job(
                [5] * length, f"job-{number}", n=n, weights_id=weights, max_tokens=max_tokens
            )
            sampler.add(job)
            open_jobs[job.job_id] = n
        elif action == "cancel":
            job_id = sorted(open_jobs)[values[0] % len(open_jobs)] if open_jobs else "unknown"
            sampler.cancel(job_id)
            open_jobs.pop(job_id, None)
        else:
            for _ in range(values[0]):
                step()
    for _ in range(3000):
        if not sampler.busy:
            break
        step()
    assert not open_jobs
    assert_empty(sampler)


# --- refusals -----------------------------------------------------------------------------------


def test_a_full_context_is_refused_but_can_be_scored(sampler: TorchSampler) -> None:
    prompt = sequences(CONTEXT)[0]
    with pytest.raises(ContextLengthError, match="has 256 tokens"):
        sampler.add(sample_job(prompt))
    (result,) = finish(sampler, [sample_job(prompt, n=0, prompt_logprobs=True)]).values()
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == CONTEXT


@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_weights_that_are_not_finite_are_not_published(
    sampler: TorchSampler, trainer: TorchTrainer, training_mode: TrainingMode
) -> None:
    run_id = new_run(trainer, architecture="llama", training_mode=training_mode)
    for value in (float("nan"), float("inf")):
        bad = trainer.snapshot(run_id)
        next(t for name, t in bad.tensors.items() if "q_proj" in name)[0, 0] = value
        with pytest.raises(NonFiniteError, match="q_proj"):
            sampler.publish("bad", bad)
        with pytest.raises(NotFoundError):
            sampler.add(sample_job([5] * 9, weights_id="bad"))
    large = trainer.snapshot(run_id)
    next(iter(large.tensors.values()))[0, 0] = 1e30
    sampler.publish("large", large)


def test_logits_that_are_not_finite_fail_their_job_alone(
    sampler: TorchSampler, trainer: TorchTrainer
) -> None:
    run_id = new_run(trainer, architecture="llama")
    bad = trainer.snapshot(run_id)
    sampler.publish("bad", bad)
    for tensor in bad.tensors.values():  # of which an adapter makes no copies
        tensor.fill_(torch.nan)
    good = sample_job([5] * 9, "good", seed=1, max_tokens=20)
    expected = finish(sampler, [good])
    sampler.add(good)
    sampler.add(sample_job([5] * 9, "bad", weights_id="bad", n=2))
    sampler.add(sample_job([5] * 9, "scored", weights_id="bad", n=0, prompt_logprobs=True))
    results: dict[str, Any] = {}
    while sampler.busy:
        results |= {p.job_id: p.error or p.result for p in sampler.step()}
    for name in ("bad", "scored"):
        assert isinstance(results[name], NonFiniteError), results
    assert results["good"].sequences[0].tokens == expected["good"].sequences[0].tokens
    assert_empty(sampler)
    assert finish(sampler, [good]) == expected


def peft_folder(model_folder: Callable[[str], Path], folder: Path) -> Path:
    """An adapter that PEFT wrote for the Llama."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(reference_model(model_folder("llama")), config).save_pretrained(folder)
    return folder


def test_a_folder_of_peft_is_sampled_as_peft_samples_it(
    sampler: TorchSampler, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = peft_folder(model_folder, tmp_path)
    assert sampler.load("peft", "llama", folder) == 0
    reference = peft.PeftModel.from_pretrained(reference_model(model_folder("llama")), folder)
    prompt = sequences(9)[0]
    theirs = reference.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, 9, dtype=torch.int64),
        max_new_tokens=20,
        do_sample=False,
    )[0, 9:]
    ours = one(sampler, prompt, weights_id="peft", temperature=0.0, max_tokens=20)
    assert list(ours.tokens) == theirs.tolist()


def test_folders_that_do_not_fit_are_refused_and_nothing_changes(
    sampler: TorchSampler, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    good = peft_folder(model_folder, tmp_path / "good")
    sampler.load("w", "llama", good)
    job = sample_job([5, 6], weights_id="w", temperature=0.0)
    expected = finish(sampler, [job])

    def broken(name: str, **files: str | None) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        for file, content in files.items():
            path = folder / file.replace("__", ".")
            path.unlink() if content is None else path.write_text(content)
        return folder

    settings = json.loads((good / "adapter_config.json").read_text())
    cases: list[tuple[type[WeaverError], str, Path]] = [
        (CheckpointCorruptError, "llama", tmp_path / "nowhere"),
        (CheckpointCorruptError, "llama", broken("no-tensors", adapter_model__safetensors=None)),
        (CheckpointCorruptError, "llama", broken("cut", adapter_model__safetensors="\x08")),
        (CheckpointCorruptError, "llama", broken("no-json", adapter_config__json="{")),
        (
            UnsupportedError,
            "llama",
            broken("dora", adapter_config__json=json.dumps({**settings, "use_dora": True})),
        ),
        (CheckpointMismatchError, "phi3", good),
        (CheckpointMismatchError, "phi3", model_folder("llama")),
        (UnknownModelError, "lama", good),
    ]
    for error, base_model, folder in cases:
        with pytest.raises(error):
            sampler.load("w", base_model, folder)
    assert finish(sampler, [job]) == expected
