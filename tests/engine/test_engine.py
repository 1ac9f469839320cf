"""`TorchEngine` and its catalog: names, tokenizers, and refusals from a configuration alone."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from tests.engine.conftest import (
    GEMMA,
    LORA,
    SIZES,
    VOCAB,
    datum,
    job,
    result_of,
    save_tiny,
    sequences,
)
from tests.engine.sampler_kit import finish, sample_job, save_tokenizer
from weaver.engine.torch.attention_choice import Attention
from weaver.engine.torch.catalog import only_here
from weaver.engine.torch.engine import TorchEngine
from weaver.errors import ConfigError, UnknownModelError, UnsupportedError
from weaver.types import AdamParams, LoraConfig, Message

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.zoo import Zoo
    from weaver.engine.torch.attention import Heads, Layout


BOTH_WAYS: dict[str, Any] = {**SIZES, **GEMMA, "use_bidirectional_attention": True}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weaver.engine.torch.catalog.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("reached", [False, True])
def test_a_hub_is_asked_before_its_client_is(
    reached: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    httpx = pytest.importorskip("httpx")

    def head(url: str, *, timeout: float) -> None:
        if not reached:
            raise httpx.ConnectError("no network in tests")

    monkeypatch.setattr("weaver.engine.torch.catalog.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", head)
    assert only_here("owner/name") != reached
    assert only_here(str(tmp_path))


def write_config(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    return folder


def test_named_models_and_folders_are_described_without_weights(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = TorchEngine({"mine": model_folder("qwen3")})
    assert [info.name for info in engine.list_models()] == ["weaver-nano", "mine"]
    info = engine.get_model("mine")
    assert (info.architecture, info.vocab_size, info.context_length) == (
        "Qwen3ForCausalLM",
        VOCAB,
        256,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("qwen3"))
    assert info.num_parameters == model.num_parameters()
    assert [info.dtype for info in engine.list_models()] == ["float32", "float32"]
    bare = write_config(tmp_path / "bare", transformers.LlamaConfig(**SIZES))
    assert engine.get_model(str(bare)).architecture == "LlamaForCausalLM"
    with pytest.raises(UnsupportedError, match="cannot be read"):
        engine.trainer.create_run("run", str(bare), training_mode="lora", lora_config=LORA, seed=0)


@pytest.mark.parametrize("name", ["nope", "acme/nothing-here", "/no/such/folder", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    engine = TorchEngine({})
    with pytest.raises(UnknownModelError, match="Known: weaver-nano"):
        engine.get_model(name)


def test_folders_are_unknown_where_paths_are_not_allowed(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    closed = TorchEngine({}, allow_paths=False)
    with pytest.raises(UnknownModelError):
        closed.get_model(str(model_folder("qwen3")))
    with pytest.raises(UnknownModelError, match="config"):
        TorchEngine().get_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: transformers.T5Config(), "not a causal language model"),
        (lambda: transformers.Gemma3Config(), "more than a text decoder"),
        (lambda: transformers.MiMoV2FlashConfig(num_hidden_layers=6), "differ in their key heads"),
        (lambda: transformers.MambaConfig(num_hidden_layers=1), "linear_attention"),
        (lambda: transformers.Qwen3NextConfig(num_hidden_layers=4), "linear_attention"),
        (
            lambda: transformers.Gemma3TextConfig(**BOTH_WAYS),
            "not causal",
        ),
    ],
)
def test_models_that_cannot_run_are_refused_by_their_configuration(
    config: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, config())
    with pytest.raises(UnsupportedError, match=reason):
        TorchEngine().get_model(str(folder))


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError):
        TorchEngine().get_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, transformers.LlamaConfig(**SIZES))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        TorchEngine().trainer.create_run(
            "run", str(folder), training_mode="lora", lora_config=LORA, seed=0
        )


def test_context_is_bounded_where_rotary_scaling_depends_on_the_batch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = transformers.Phi3Config(
        **SIZES, rope_parameters=rope, original_max_position_embeddings=64
    )
    folder = write_config(tmp_path, config)
    assert TorchEngine().get_model(str(folder)).context_length == 64


def test_a_head_that_is_scaled_is_exact(tmp_path: Path) -> None:
    """Granite divides its logits, Cohere multiplies; loading compares with transformers."""
    for name, config in (
        ("granite", transformers.GraniteConfig(**SIZES, logits_scaling=4.0)),
        ("cohere", transformers.CohereConfig(**SIZES, logit_scale=0.25)),
    ):
        save_tiny(config, tmp_path / name)
        engine = TorchEngine({name: tmp_path / name})
        engine.trainer.create_run(name, name, training_mode="lora", lora_config=LORA, seed=0)


def test_a_model_whose_tokens_see_other_sequences_is_refused(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leak(heads: Heads, layout: Layout) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *heads[:3], is_causal=True, enable_gqa=True
        ).transpose(1, 2)

    leaking = Attention("blocks", leak)
    monkeypatch.setattr("weaver.engine.torch.model_check.BLOCKS", leaking)
    monkeypatch.setattr("weaver.engine.torch.model_check.by_rule", lambda *_, **__: [leaking])
    engine = TorchEngine({"tiny": model_folder("llama")})
    with pytest.raises(UnsupportedError, match="packed logits would differ"):
        engine.trainer.create_run("run", "tiny", training_mode="lora", lora_config=LORA, seed=0)


def test_a_head_that_is_not_known_is_refused(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver.engine.torch.models.Head.finish", lambda self, z: 2 * z)
    engine = TorchEngine({"tiny": model_folder("llama")})
    with pytest.raises(UnsupportedError, match="packed logits would differ"):
        engine.trainer.create_run("run", "tiny", training_mode="lora", lora_config=LORA, seed=0)


def test_text_and_chats_are_encoded(tmp_path: Path) -> None:
    engine = TorchEngine({"bare": write_config(tmp_path, transformers.LlamaConfig(**SIZES))})
    tokens = engine.encode("weaver-nano", "rev:abc=")
    chat = engine.encode("weaver-nano", [Message(role="user", content="rev:abc=")])
    assert len(chat) > len(tokens) > 0
    assert all(isinstance(token, int) for token in (*tokens, *chat))
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        engine.encode("bare", "text")


def test_tokenizer_files_make_the_same_tokenizer(tmp_path: Path) -> None:
    engine = TorchEngine()
    for name, content in engine.tokenizer_files("weaver-nano").items():
        (tmp_path / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("rev:abc=cba") == engine.encode("weaver-nano", "rev:abc=cba")
    assert tokenizer.chat_template


def test_what_cannot_be_configured_is_said() -> None:
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        TorchEngine(dtype="int8")
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match="device"):
            TorchEngine(device=device)


def test_the_engine_says_where_and_how_it_computes() -> None:
    for device, why in (("cpu", "as set"), ("auto", "auto: .* CUDA.*")):
        engine = TorchEngine(device=device, threads=3)
        where = rf"torch {re.escape(torch.__version__)} on cpu \({why}\), float32, 3 threads"
        assert re.fullmatch(where, engine.description)
        assert engine.get_model("weaver-nano").dtype == "float32"
        engine.close()


def test_a_closed_engine_holds_no_memory_of_runs_and_samples() -> None:
    engine = TorchEngine()
    trainer, sampler = engine.trainer, engine.sampler
    for mode in ("lora", "full_ft"):
        lora = LORA if mode == "lora" else None
        trainer.create_run(mode, "weaver-nano", training_mode=mode, lora_config=lora, seed=0)
        sampler.publish(mode, trainer.snapshot(mode))
        sampler.add(sample_job([5] * 9, mode, weights_id=mode, n=2))
    sampler.step()
    sampler.step()
    held = [weakref.ref(group) for group in sampler._groups.values()]
    held += [weakref.ref(job.model) for job in sampler._jobs.values()]
    held += [weakref.ref(run.own) for run in trainer._runs.values() if run.own]
    held.append(weakref.ref(engine._store.base("weaver-nano")))
    assert len(held) >= 5
    engine.close()
    gc.collect()
    assert not sampler.busy
    assert [ref() for ref in held] == [None] * len(held)


def test_small_models_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("weaver.engine.torch.model_store.physical_cores", lambda: 7)
    for threads in (0, 3):
        engine = TorchEngine(threads=threads)
        engine.trainer.create_run(
            "run", "weaver-nano", training_mode="lora", lora_config=LORA, seed=0
        )
        result_of(engine.trainer, job("run", [datum([3, 4, 5])], backward=False))
        monkeypatch.setattr("weaver.engine.torch.model_store.SMALL_MODEL", 0)
    assert asked == [1, 1, 3, 3]  # to check the model, then to compute


def test_bfloat16_base_weights_keep_float32_adapters(model_folder: Callable[[str], Path]) -> None:
    engine = TorchEngine({"tiny": model_folder("qwen3")}, dtype="bfloat16", threads=1)
    trainer = engine.trainer
    trainer.create_run("run", "tiny", training_mode="lora", lora_config=LoraConfig(rank=4), seed=0)
    exact = TorchEngine({"tiny": model_folder("qwen3")}, threads=1).trainer
    exact.create_run("run", "tiny", training_mode="lora", lora_config=LoraConfig(rank=4), seed=0)
    data = [datum(s) for s in sequences(9, 9, 14)]
    losses = []
    for t in (trainer, exact):
        losses.append(result_of(t, job("run", data)).metrics["loss"])
        t.optim_step("run", AdamParams(learning_rate=1e-2))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]
    assert {t.dtype for t in trainer.snapshot("run").tensors.values()} == {torch.float32}
    trainer.create_run("full", "tiny", training_mode="full_ft", lora_config=None, seed=0)
    result_of(trainer, job("full", data))
    assert {t.dtype for t in trainer.snapshot("full").tensors.values()} == {torch.float32}


def test_a_sample_ends_where_the_chat_template_ends_a_turn(zoo: Zoo, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.model("llama", "gemma"), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    end = zoo.tokenizer("gemma").convert_tokens_to_ids("<end_of_turn>")
    assert model.generation_config.eos_token_id != end != model.config.eos_token_id
    with torch.no_grad():  # what is trained to end its turn behind token 5
        for name, parameter in model.named_parameters():
            if "_proj" in name or "lm_head" in name:
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        model.lm_head.weight[end] = 100 * embedding[5] / embedding[5].norm()
    model.save_pretrained(folder)
    engine = TorchEngine()
    engine.sampler.load("base", str(folder), None)
    (drawn,) = finish(engine.sampler, [sample_job([5], temperature=0)])["job"].sequences
    assert (drawn.tokens, drawn.stop_reason) == ((end,), "stop")


def test_the_tokenizer_is_read_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(transformers.LlamaConfig(**SIZES), tmp_path)
    save_tokenizer(tmp_path)
    began, go = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        began.set()
        assert go.wait(30)
        raise ValueError("it is broken")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", slow)
    engine = TorchEngine({"tiny": tmp_path})
    engine.sampler.load("base", "tiny", None)
    assert began.wait(30)
    go.set()
    with pytest.raises(UnsupportedError, match="it is broken"):
        engine.tokenizer("tiny")
