"""Checkpoints of weights from elsewhere: an adapter in PEFT's layout, or a whole model.

`TorchEngine.import_weights` makes them, for runs to begin with.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from weaver import errors
from weaver.engine.base import ImportedWeights
from weaver.engine.torch import files
from weaver.engine.torch.adapter_files import ADAPTER_CONFIG, read_adapter, write_adapter
from weaver.engine.torch.catalog import Catalog, ModelFacts
from weaver.engine.torch.checkpoints import STATE, State, write_tokenizer
from weaver.engine.torch.lora import choose_targets, new_adapter
from weaver.types import LoraConfig, Quantize

UNLIKE = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Settings in which a model and the base that it was made of may differ: they change no logit."""
OWN = "the imported model"


def import_weights(
    catalog: Catalog, source: Path, folder: Path, *, base_model: str | None, quantize: Quantize
) -> ImportedWeights:
    """See `Engine.import_weights`."""
    try:
        if (source / ADAPTER_CONFIG).is_file():
            facts, config = _import_adapter(catalog, source, folder, base_model=base_model)
        elif (source / files.CONFIG).is_file():
            facts, config = _import_model(catalog, source, folder, base_model=base_model), None
        else:
            raise errors.CheckpointCorruptError(
                f"there is neither {ADAPTER_CONFIG} nor {files.CONFIG}.",
                field="files",
                hint="Import an adapter as PEFT saves it, or a model as transformers does.",
            )
        kept: Quantize = "none" if config is None else quantize
        state = State.of(facts.info, config, step=0, quantize=kept)
        (folder / STATE).write_text(json.dumps(state.model_dump(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise errors.StorageError(
            f"the import cannot be written: {getattr(error, 'strerror', None) or error}",
            hint="Free some space or check the permissions.",
        ) from error
    return ImportedWeights(base_model=facts.info.name, lora_config=config)


def _import_adapter(
    catalog: Catalog, source: Path, folder: Path, *, base_model: str | None
) -> tuple[ModelFacts, LoraConfig]:
    """Layers that a run trains beside those of the adapter begin as a new one's: they add nothing
    to the output."""
    named = files.read_json(source / ADAPTER_CONFIG).get("base_model_name_or_path")
    facts = catalog.facts(base_model or _base_of(catalog, named))
    tensors, config = read_adapter(source, facts=facts)
    targets = choose_targets(
        facts.targets.values(), config, model=facts.info.name, fused_experts=facts.fused_experts
    )
    size = facts.config.hidden_size
    run = new_adapter(targets, config, seed=0, device=torch.device("cpu"), hidden_size=size)
    whole = run.tensors() | tensors
    write_adapter(folder, whole, config=config, base=facts.origin)
    return facts, config


def _base_of(catalog: Catalog, named: Any) -> str:
    """What the catalog calls the base that an adapter names."""
    if not isinstance(named, str) or not named:
        raise _without_base(f"{ADAPTER_CONFIG} does not name its base model.")
    return catalog.name_of(named)


def _import_model(
    catalog: Catalog, source: Path, folder: Path, *, base_model: str | None
) -> ModelFacts:
    if base_model is None:
        raise _without_base("a whole model does not say which base it was made of.")
    facts = catalog.facts(base_model)
    theirs = Catalog({OWN: source}, allow_paths=False).facts(OWN)
    ours = facts.config.to_dict()
    for name, value in sorted((ours | theirs.config.to_dict()).items()):
        if name not in UNLIKE and ours.get(name) != theirs.config.to_dict().get(name):
            raise errors.CheckpointMismatchError(
                f"the model has {name} {value!r}, {base_model} has {ours.get(name)!r}.",
                field="base_model",
                hint="Name the base that it was made of, or serve it as a base of its own.",
            )
    module = files.read_module(source, name=OWN, config=facts.config, dtype=torch.float32)
    with files.without_progress_bars():
        module.save_pretrained(folder, max_shard_size=files.SHARD_BYTES)
    with suppress(errors.UnsupportedError):  # the base model has no tokenizer either
        write_tokenizer(facts, folder)
    return facts


def _without_base(what: str) -> errors.InvalidParamsError:
    return errors.InvalidParamsError(what, field="base_model", hint="Name the base model.")
