"""A whole model of a base and a LoRA adapter, as a folder that transformers reads.

`TorchEngine.merge_adapter` calls it for exports. R rank; W [out, in], A [R, in], B [out, R].
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from weaver.engine.adapters import read_adapter, read_json
from weaver.engine.lora import adapter_from_tensors
from weaver.engine.weight_files import CONFIG, INDEX, WEIGHTS, folder_of, tied_weights
from weaver.errors import StorageError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.catalog import ModelFacts
    from weaver.engine.lora import Adapter

BESIDE = {".json", ".jinja", ".txt", ".model"}
"""Of the files that are copied: the tokenizer and the generation settings."""


def merge_adapter(facts: ModelFacts, adapter: Path, folder: Path) -> None:
    """Writes the base's files with W + scale·B·A in the adapter's layers into an empty folder.

    Computed in float32 and kept in the dtype of each W; one file of weights is in memory at a time.
    A tied head that the adapter changes is untied: the embedding stays, `config.json` says so.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError: the adapter is damaged or of another model.
        UnsupportedError: a variant of LoRA, or the base's files name their layers in another way.
        StorageError: the disk is full or not writable.
    """
    tensors, config = read_adapter(adapter, facts=facts)
    scale = config.alpha / config.rank
    source = folder_of(facts.source)
    try:
        _write(
            source,
            folder,
            adapter_from_tensors(tensors, scale=scale, device=torch.device("cpu")),
            untied=_untied(facts, tensors),
            name=facts.info.name,
        )
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"merging {facts.info.name} failed: {error}",
            hint="Check the free space, and that the base model's files are complete.",
        ) from error


def _write(
    source: Path, folder: Path, adapter: Adapter, *, untied: Mapping[str, str], name: str
) -> None:
    """`untied` maps the name of a head's weight to that of the embedding it was tied to."""
    sharded = (source / INDEX).is_file()
    index: dict[str, Any] = read_json(source / INDEX) if sharded else {"weight_map": {}}
    merged: set[str] = set()
    for shard in sorted(set(index["weight_map"].values())) or [WEIGHTS]:
        weights = load_file(source / shard)
        for head, embedding in untied.items():
            weights.pop(head, None)
            if embedding in weights:
                weights[head] = weights[embedding].clone()
                index["weight_map"][head] = shard
        for path, pair in adapter.pairs.items():
            weight = weights.get(f"{path}.weight")
            if weight is not None:
                total = weight.float() + adapter.scale * (pair.b @ pair.a)
                weights[f"{path}.weight"] = total.to(weight.dtype)
                merged.add(path)
        save_file(weights, folder / shard, metadata={"format": "pt"})
    missing = sorted(adapter.pairs.keys() - merged)
    if missing:
        raise UnsupportedError(
            f"the files of {name} have no {missing[0]}.weight ({len(missing)} layers in all).",
            field="merge",
            hint="Export the adapter alone, and merge it with PEFT.",
        )
    for file in source.iterdir():
        if file.suffix in BESIDE and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    if sharded:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if untied:
        settings = read_json(source / CONFIG) | {"tie_word_embeddings": False}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _untied(facts: ModelFacts, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
    """The tied weights, by name, that the adapter changes, and what each was tied to."""
    changed = {f"{name.removesuffix('.lora_A.weight')}.weight" for name in tensors}
    return {
        k: v
        for k, v in tied_weights(facts).items()
        if any(name.endswith(f".{k}") for name in changed)
    }
