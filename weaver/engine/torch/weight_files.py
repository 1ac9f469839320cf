"""The files of a base model's weights: where they are, and single tensors of them.

Merging copies them, and the reading of adapters compares with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from weaver.engine.torch.catalog import ModelFacts

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F64", "F32", "F16", "BF16"}


def folder_of(source: str) -> Path:
    """Where a model's files are: a folder, or the cache of the hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(str(cached_file(source, CONFIG, local_files_only=True))).parent


def tied_weights(facts: ModelFacts) -> Mapping[str, str]:
    """Names of weights that the files need not have, and of those that they are tied to."""
    tied = AutoModelForCausalLM._model_mapping[type(facts.config)]._tied_weights_keys
    return tied or {} if facts.config.tie_word_embeddings else {}


def weight_without_fractions(folder: Path) -> str | None:
    """The first weight that is stored as integers or bytes, as quantised ones are."""
    shards = {WEIGHTS}
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    for shard in sorted(shards):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():
                if name.endswith(".weight") and file.get_slice(name).get_dtype() not in FLOATS:
                    return str(name)
    return None


def stored_tensor(facts: ModelFacts, name: str) -> torch.Tensor | None:
    """One tensor by the name that the model gives it; None where the files cannot tell."""
    names = (name, tied_weights(facts).get(name, name))
    try:
        folder = folder_of(facts.source)
        shards = dict.fromkeys(names, WEIGHTS)
        if (folder / INDEX).is_file():
            shards = json.loads((folder / INDEX).read_text())["weight_map"]
        for key in names:
            if key in shards:
                with safe_open(folder / shards[key], framework="pt") as file:
                    if key in file.keys():
                        tensor: torch.Tensor = file.get_tensor(key)
                        return tensor
    except (OSError, SafetensorError, ValueError, KeyError):
        pass  # the loading of the base says what is wrong with them
    return None
