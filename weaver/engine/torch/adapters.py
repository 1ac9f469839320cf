"""LoRA adapters in PEFT's file format, and merged with their base into a whole model.

Checkpoints of LoRA runs are such folders: `adapter_config.json` and `adapter_model.safetensors`;
the sampler loads folders that PEFT itself wrote too. `TorchEngine.merge_adapter` makes exports.
R rank; W [out, in], A [R, in], B [out, R].
"""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from weaver import errors
from weaver.engine.torch import models
from weaver.engine.torch.lora import PREFIX, adapter_from_tensors
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.lora import Adapter, LoraPair


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Settings of adapter_config.json that may have any value: they are read elsewhere, only say which
layers are adapted, which the tensors tell, or count for training, or beside another setting."""
PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings, and the values under which an adapter is what `Adapter` is."""
NEUTRAL: tuple[object, ...] = (None, False, [], {})
"""The values of every other setting under which it changes nothing, and PEFT's defaults of them."""
BESIDE = {".json", ".jinja", ".txt", ".model"}
"""Of the files that are copied: the tokenizer and the generation settings."""


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, config: LoraConfig, base: str
) -> None:
    """`tensors` by PEFT's names; `base` is what they call the model below."""
    leaves = {name.rsplit(".", 3)[1] for name in tensors}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(leaves),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "modules_to_save": None,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path, *, facts: ModelFacts) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """An adapter's fp32 tensors by PEFT's names, and a configuration with its rank and scale.

    Raises:
        CheckpointCorruptError: a file is missing, unreadable or not finite.
        CheckpointMismatchError: it does not fit the model.
        UnsupportedError: a variant of LoRA, such as DoRA; a setting or tensor that is not known.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise corrupt(folder / ADAPTER_CONFIG, "lacks r or lora_alpha")
    _check_settings(settings)
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # PEFT scales it by alpha / sqrt(r)
    tensors = _lora_tensors(read_tensors(folder / ADAPTER_WEIGHTS), facts)
    roles = _check_fit(tensors, rank, facts, folder)
    return tensors, LoraConfig(
        rank=rank,
        alpha=alpha,
        train_attn="attn" in roles,
        train_mlp="mlp" in roles,
        train_unembed="unembed" in roles,
    )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses what is not known to leave an adapter plain, also settings of PEFT's to come."""
    for name in sorted((settings.keys() | {"peft_type"}) - FREE):
        value = settings.get(name)
        if value not in PLAIN.get(name, NEUTRAL):
            raise _not_plain(f"{name} = {json.dumps(value)[:100]}.")


def _lora_tensors(
    tensors: Mapping[str, torch.Tensor], facts: ModelFacts
) -> dict[str, torch.Tensor]:
    """Those of LoRA, in fp32, after checking that all others are copies of the base's.

    PEFT adds copies of the base's embeddings where lm_head is adapted, and reads them back.
    """
    lora: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            lora[name] = tensor.float()
            continue
        base = models.stored_tensor(facts, name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None or not torch.equal(base.to(tensor.dtype), tensor):
            raise _not_plain(
                f"{name}, which is neither LoRA's nor what {facts.info.name} has there."
            )
    return lora


def _check_fit(
    tensors: Mapping[str, torch.Tensor], rank: int, facts: ModelFacts, folder: Path
) -> set[str]:
    """The roles of the adapted layers, after checking every tensor's name and shape."""
    roles: set[str] = set()
    stems = {name.rsplit(".lora_", 1)[0] for name in tensors}
    for stem in sorted(stems):
        target = facts.targets.get(stem.removeprefix(PREFIX))
        if target is None:
            raise _of_another(f"the adapter changes {stem}, {facts.info.name} has no such layer.")
        shapes = {"A": (rank, target.in_features), "B": (target.out_features, rank)}
        for matrix, shape in shapes.items():
            tensor = tensors.get(f"{stem}.lora_{matrix}.weight")
            if tensor is None:
                raise corrupt(folder / ADAPTER_WEIGHTS, f"lacks {stem}.lora_{matrix}.weight")
            if tuple(tensor.shape) != shape:
                raise _of_another(
                    f"{stem}.lora_{matrix} has shape {list(tensor.shape)}, "
                    f"{facts.info.name} needs {list(shape)}."
                )
        roles.add(target.role)
    if not roles:
        raise corrupt(folder / ADAPTER_WEIGHTS, "has no LoRA tensors")
    return roles


def _not_plain(what: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"the adapter has {what}",
        field="model_path",
        hint="Only plain LoRA adapters are read; merge it with PEFT into a whole model.",
    )


def _of_another(what: str) -> errors.CheckpointMismatchError:
    return errors.CheckpointMismatchError(
        what, field="path", hint="Load it on the model it was trained on."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointCorruptError where it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise corrupt(path, f"cannot be read ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise corrupt(path, "is not a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Copies of a safetensors file's tensors; CheckpointCorruptError if it is broken or not finite.

    Copies, because `load_file` gives views of the file, and somebody may write over it.
    """
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise corrupt(path, f"cannot be read ({type(error).__name__})") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise corrupt(path, f"has values in {name} that are not finite")
    return tensors


def corrupt(path: Path, what: str) -> errors.CheckpointCorruptError:
    """Of a file of a checkpoint."""
    return errors.CheckpointCorruptError(
        f"{path.name} in {path.parent.name} {what}.", field="path", hint="Use another checkpoint."
    )


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
    made = adapter_from_tensors(tensors, config, device=torch.device("cpu"))
    source, untied = models.folder_of(facts.source), _untied(facts, tensors)
    changed = {f"{path}.weight" for path in made.pairs}
    try:
        shards = models.weight_map(source)
        if changed <= shards.keys() | untied.keys():
            _write_shards(source, folder, made, shards=shards, untied=untied)
        else:
            _write_whole(facts, folder, made, untied=untied)
        _copy_others(facts, source, folder)
        if untied:
            settings = read_json(source / models.CONFIG) | {"tie_word_embeddings": False}
            (folder / models.CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise errors.StorageError(
            f"merging {facts.info.name} failed: {error}",
            hint="Check the free space, and that the base model's files are complete.",
        ) from error


def _write_shards(
    source: Path,
    folder: Path,
    adapter: Adapter,
    *,
    shards: dict[str, str],
    untied: Mapping[str, str],
) -> None:
    """`untied` maps the names of a head's tensors to those that they were tied to."""
    for shard in sorted(set(shards.values())):
        weights = load_file(source / shard)
        for head, embedding in untied.items():
            weights.pop(head, None)
            if embedding in weights:
                weights[head] = weights[embedding].clone()
                shards[head] = shard
        for path, pair in adapter.pairs.items():
            if f"{path}.weight" in weights:
                weights[f"{path}.weight"] = _merged(weights[f"{path}.weight"], pair, adapter.scale)
        save_file(weights, folder / shard, metadata={"format": "pt"})
    if (source / models.INDEX).is_file():
        index = read_json(source / models.INDEX) | {"weight_map": shards}
        (folder / models.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_whole(
    facts: ModelFacts, folder: Path, adapter: Adapter, *, untied: Mapping[str, str]
) -> None:
    dtype = facts.config.dtype or torch.float32
    module = models.read_module(
        facts.source, name=facts.info.name, config=facts.config, dtype=dtype
    )
    for name in untied:
        module.config.tie_word_embeddings = False
        owner, _, leaf = name.rpartition(".")
        own = torch.nn.Parameter(module.get_parameter(name).detach().clone())
        setattr(module.get_submodule(owner), leaf, own)
    for path, pair in adapter.pairs.items():
        layer = module.get_submodule(path)
        layer.weight = torch.nn.Parameter(_merged(layer.weight, pair, adapter.scale))
    with models.without_progress_bars():
        module.save_pretrained(folder)


@torch.no_grad()
def _merged(weight: torch.Tensor, pair: LoraPair, scale: float) -> torch.Tensor:
    return (weight.float() + scale * (pair.b @ pair.a)).to(weight.dtype)


def _copy_others(facts: ModelFacts, source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.suffix in BESIDE and file.name != models.INDEX:
            shutil.copyfile(file, folder / file.name)
    if (source / CHAT_TEMPLATE_DIR).is_dir():  # a checkpoint has no folders
        (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
        for name, content in facts.tokenizer_files().items():
            (folder / name).write_bytes(content)


def _untied(facts: ModelFacts, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
    """All tied weights, by name, and what each was tied to, where the adapter changes one."""
    changed = {f"{name.removesuffix('.lora_A.weight')}.weight" for name in tensors}
    tied = models.tied_weights(facts)
    return tied if any(name.endswith(f".{k}") for name in changed for k in tied) else {}
