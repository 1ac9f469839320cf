"""A whole model of a base and a LoRA adapter, as a folder that transformers reads.

`TorchEngine.merge_adapter` calls it for exports. R rank; W [out, in], A [R, in], B [out, R].
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from weaver.engine.torch.adapters import read_adapter, read_json
from weaver.engine.torch.lora import adapter_from_tensors
from weaver.engine.torch.models import read_module, without_progress_bars
from weaver.engine.torch.weight_files import CONFIG, INDEX, WEIGHTS, folder_of, tied_weights
from weaver.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.lora import Adapter, LoraPair

BESIDE = {".json", ".jinja", ".txt", ".model"}
"""Of the files that are copied: the tokenizer and the generation settings."""


def merge_adapter(facts: ModelFacts, adapter: Path, folder: Path) -> None:
    """Writes the base's files with W + scale·B·A in the adapter's layers into an empty folder.

    Computed in float32 and kept in the dtype of each W; one file of weights is in memory at a time,
    or the whole model where its files name their tensors in another way than transformers does. A
    tied head that the adapter changes is untied: the embedding stays, `config.json` says so.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError: the adapter is damaged or of another model.
        UnsupportedError: a variant of LoRA, or the base cannot be read.
        StorageError: the disk is full or not writable.
    """
    tensors, config = read_adapter(adapter, facts=facts)
    scale = config.alpha / config.rank
    made = adapter_from_tensors(tensors, scale=scale, device=torch.device("cpu"))
    source, untied = folder_of(facts.source), _untied(facts, tensors)
    changed = {f"{path}.weight" for path in made.pairs}
    try:
        index = _index(source)
        if changed <= index["weight_map"].keys() | untied.keys():
            _write_shards(source, folder, made, index=index, untied=untied)
        else:
            _write_whole(facts, folder, made, untied=untied)
        _copy_others(facts, source, folder)
        if untied:
            settings = read_json(source / CONFIG) | {"tie_word_embeddings": False}
            (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"merging {facts.info.name} failed: {error}",
            hint="Check the free space, and that the base model's files are complete.",
        ) from error


def _index(source: Path) -> dict[str, Any]:
    """What the index of a model's shards says; also of one that is in a single file."""
    if (source / INDEX).is_file():
        return read_json(source / INDEX)
    with safe_open(source / WEIGHTS, framework="pt") as file:
        return {"weight_map": dict.fromkeys(file.keys(), WEIGHTS)}


def _write_shards(
    source: Path,
    folder: Path,
    adapter: Adapter,
    *,
    index: dict[str, Any],
    untied: Mapping[str, str],
) -> None:
    """`untied` maps the names of a head's tensors to those that they were tied to."""
    for shard in sorted(set(index["weight_map"].values())):
        weights = load_file(source / shard)
        for head, embedding in untied.items():
            weights.pop(head, None)
            if embedding in weights:
                weights[head] = weights[embedding].clone()
                index["weight_map"][head] = shard
        for path, pair in adapter.pairs.items():
            if f"{path}.weight" in weights:
                weights[f"{path}.weight"] = _merged(weights[f"{path}.weight"], pair, adapter.scale)
        save_file(weights, folder / shard, metadata={"format": "pt"})
    if (source / INDEX).is_file():
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_whole(
    facts: ModelFacts, folder: Path, adapter: Adapter, *, untied: Mapping[str, str]
) -> None:
    dtype = facts.config.dtype or torch.float32
    module = read_module(facts.source, name=facts.info.name, config=facts.config, dtype=dtype)
    for name in untied:
        module.config.tie_word_embeddings = False
        owner, _, leaf = name.rpartition(".")
        own = torch.nn.Parameter(module.get_parameter(name).detach().clone())
        setattr(module.get_submodule(owner), leaf, own)
    for path, pair in adapter.pairs.items():
        layer = module.get_submodule(path)
        layer.weight = torch.nn.Parameter(_merged(layer.weight, pair, adapter.scale))
    with without_progress_bars():
        module.save_pretrained(folder)


@torch.no_grad()
def _merged(weight: torch.Tensor, pair: LoraPair, scale: float) -> torch.Tensor:
    return (weight.float() + scale * (pair.b @ pair.a)).to(weight.dtype)


def _copy_others(facts: ModelFacts, source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.suffix in BESIDE and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    if (source / CHAT_TEMPLATE_DIR).is_dir():  # a checkpoint has no folders
        (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
        for name, content in facts.tokenizer_files().items():
            (folder / name).write_bytes(content)


def _untied(facts: ModelFacts, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
    """All tied weights, by name, and what each was tied to, where the adapter changes one."""
    changed = {f"{name.removesuffix('.lora_A.weight')}.weight" for name in tensors}
    tied = tied_weights(facts)
    return tied if any(name.endswith(f".{k}") for name in changed for k in tied) else {}
