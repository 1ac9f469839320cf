"""Packed logits and LoRA gradients against transformers and PEFT, over ten architectures."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from tests.engine.conftest import (
    DEVICE,
    SIZES,
    datum,
    gradient_of,
    job,
    lora_config,
    new_run,
    of_the_cpu,
    reference_model,
    result_of,
    save_tiny,
    sequences,
)
from tests.optional import peft
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.kernels import Prepacked
from weaver.engine.torch.linear import FrozenLinear
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.packing import pack
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings=True:UserWarning"),
]


@torch.no_grad()
def test_packed_logits_equal_those_of_transformers(
    architecture: str, store: ModelStore, model_folder: Callable[[str], Path]
) -> None:
    model, reference = store.base(architecture), reference_model(model_folder(architecture))
    tokens = sequences(3, 3, 1, 17, 9, 9, 9)
    batch = pack(tokens, adapters=[None] * len(tokens), device=DEVICE)
    ours = model.logits(model.hidden_states(batch), [None] * sum(batch.lengths))
    theirs = torch.cat([reference(torch.tensor([s])).logits[0] for s in tokens])
    torch.testing.assert_close(ours.cpu(), theirs, atol=5e-5, rtol=0)


@torch.no_grad()
def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    save_tiny(transformers.Qwen3Config(**SIZES), tmp_path / "qwen3")
    catalog = Catalog({"qwen3": tmp_path / "qwen3"}, allow_paths=False)
    model = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1).base("qwen3")
    batch = pack([[1, 2, 3]], adapters=[None], device=DEVICE)
    before = model.hidden_states(batch)
    weights = tmp_path / "qwen3" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert torch.equal(model.hidden_states(batch), before)


@pytest.mark.parametrize("name", ["owner/name", "Qwen/Qwen3-0.6B", "./owner/name", "missing"])
def test_a_server_opens_no_model_but_those_it_serves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(transformers.Qwen3Config(**SIZES), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert Catalog({}, allow_paths=True).facts("owner/name").info.architecture == "Qwen3ForCausalLM"
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it was opened")
    )
    with pytest.raises(UnknownModelError, match=r"no such model.*weaver serve --model"):
        Catalog({"served": tmp_path}, allow_paths=False).facts(name)


@of_the_cpu
def test_a_model_of_prepacked_layers_equals_transformers_and_peft(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 384, "intermediate_size": 512, "vocab_size": 1000}
    folder = tmp_path / "qwen3"
    save_tiny(transformers.Qwen3Config(**sizes | {"initializer_range": 0.05}), folder)
    catalog = Catalog({"qwen3": folder}, allow_paths=False)
    store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
    layers = [m for m in store.base("qwen3").module.modules() if isinstance(m, FrozenLinear)]
    kernels = {id(layer.projection): layer.projection.kernel for layer in layers}
    # of two layers: queries, keys and values; output; gate and up; down; and the head
    assert [type(kernel) for kernel in kernels.values()] == [Prepacked] * (2 * 4 + 1)
    assert_equals_peft(TorchTrainer(store), folder)


def test_log_probabilities_and_gradients_equal_those_of_peft(
    architecture: str, trainer: TorchTrainer, model_folder: Callable[[str], Path]
) -> None:
    assert_equals_peft(trainer, model_folder(architecture))


def assert_equals_peft(trainer: TorchTrainer, folder: Path) -> None:
    run_id = new_run(trainer, architecture=folder.name)
    tokens = sequences(5, 5, 21, 12)
    reference = peft_model(trainer, run_id, folder)
    expected = [
        torch.log_softmax(reference(torch.tensor([s[:-1]])).logits[0], -1)[range(len(s) - 1), s[1:]]
        for s in tokens
    ]
    torch.cat(expected).mean().neg().backward()
    result = result_of(trainer, job(run_id, [datum(s) for s in tokens]))
    for output, logprobs in zip(result.loss_fn_outputs, expected, strict=True):
        torch.testing.assert_close(
            output["logprobs"].to_torch(), logprobs.detach(), atol=5e-5, rtol=0
        )
    theirs = dict(reference.named_parameters())
    for name, gradient in gradient_of(trainer, run_id).items():
        expected_gradient = theirs[name.replace(".weight", ".default.weight")].grad
        assert relative_error(gradient, expected_gradient) < 1e-5, name


@torch.no_grad()
def test_an_adapter_equals_the_merged_weights(
    architecture: str, trainer: TorchTrainer, model_folder: Callable[[str], Path]
) -> None:
    run_id = new_run(trainer, architecture=architecture)
    merged = reference_model(model_folder(architecture))
    if merged.config.tie_word_embeddings:  # the adapter changes the head only
        merged.lm_head.weight = torch.nn.Parameter(merged.lm_head.weight.clone())
    adapter = trainer._run(run_id).adapter
    assert adapter is not None
    for path, pair in adapter.pairs.items():
        merged.get_submodule(path).weight += (adapter.scale * pair.b @ pair.a).cpu()
    tokens = sequences(5, 21, 12)
    result = result_of(trainer, job(run_id, [datum(s) for s in tokens], backward=False))
    for s, output in zip(tokens, result.loss_fn_outputs, strict=True):
        log_p = torch.log_softmax(merged(torch.tensor([s[:-1]])).logits[0], -1)
        expected = log_p[range(len(s) - 1), s[1:]]
        torch.testing.assert_close(output["logprobs"].to_torch(), expected, atol=5e-5, rtol=0)


def peft_model(trainer: TorchTrainer, run_id: str, folder: Path) -> Any:
    """PEFT's own model of the same base with the run's tensors."""
    config = lora_config(folder.name)
    tensors = trainer.snapshot(run_id).tensors
    reference = peft.get_peft_model(
        reference_model(folder),
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=sorted({name.rsplit(".", 3)[1] for name in tensors}),
            task_type="CAUSAL_LM",
        ),
    )
    own = {n: p for n, p in reference.named_parameters() if "lora_" in n}
    assert {n.replace(".default", "") for n in own} == tensors.keys()
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name.replace(".default", "")])
    return reference


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_an_origin_is_what_others_load(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id also of a folder in the hub's cache, and else a whole path."""
    cached = tmp_path / "hub" / "models--some-org--Tiny-1.5B" / "snapshots" / "0a1b2c"
    shutil.copytree(model_folder("llama"), cached)
    shutil.copytree(model_folder("llama"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    catalog = Catalog({"alias": cached, "other": "mine"}, allow_paths=False)
    assert catalog.facts("alias").origin == "some-org/Tiny-1.5B"
    assert catalog.facts("other").origin == str(tmp_path / "mine")


def test_what_a_model_is_is_read_without_a_dtype_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.Qwen3Config(**SIZES, dtype="bfloat16")
    save_tiny(config, tmp_path / "half")
    seen: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", seen.append)
    facts = Catalog({"half": tmp_path / "half"}, allow_paths=False).facts("half")
    assert facts.config.dtype == torch.bfloat16
    assert set(seen) <= {torch.float32}
