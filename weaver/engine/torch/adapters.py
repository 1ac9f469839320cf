"""PEFT's file format for LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

Checkpoints of LoRA runs are such folders; the sampler loads folders that PEFT itself wrote too.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from weaver.engine.torch.lora import PREFIX
from weaver.engine.torch.weight_files import stored_tensor
from weaver.errors import CheckpointCorruptError, CheckpointMismatchError, UnsupportedError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.torch.catalog import ModelFacts

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
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
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path, *, facts: ModelFacts) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """An adapter's fp32 tensors by PEFT's names, and a configuration with its rank and scale.

    Raises:
        CheckpointCorruptError: a file is missing, unreadable or not finite.
        CheckpointMismatchError: it does not fit the model.
        UnsupportedError: a variant of LoRA, such as DoRA; a setting or tensor that is not known.
    """
    settings = read_json(folder / CONFIG)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise corrupt(folder / CONFIG, "lacks r or lora_alpha")
    _check_settings(settings)
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # PEFT scales it by alpha / sqrt(r)
    tensors = _lora_tensors(read_tensors(folder / WEIGHTS), facts)
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
            raise UnsupportedError(
                f"the adapter has {name} = {json.dumps(value)[:100]}.",
                field="model_path",
                hint="Only plain LoRA adapters are read; merge it with PEFT into a whole model.",
            )


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
        base = stored_tensor(facts, name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None or not torch.equal(base.to(tensor.dtype), tensor):
            raise UnsupportedError(
                f"the adapter has {name}, which is neither LoRA's nor what "
                f"{facts.info.name} has there.",
                field="model_path",
                hint="Only plain LoRA adapters are read; merge it with PEFT into a whole model.",
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
            raise CheckpointMismatchError(
                f"the adapter changes {stem}, {facts.info.name} has no such layer.",
                field="path",
                hint="Load it on the model it was trained on.",
            )
        shapes = {"A": (rank, target.in_features), "B": (target.out_features, rank)}
        for matrix, shape in shapes.items():
            tensor = tensors.get(f"{stem}.lora_{matrix}.weight")
            if tensor is None:
                raise corrupt(folder / WEIGHTS, f"lacks {stem}.lora_{matrix}.weight")
            if tuple(tensor.shape) != shape:
                raise CheckpointMismatchError(
                    f"{stem}.lora_{matrix} has shape {list(tensor.shape)}, "
                    f"{facts.info.name} needs {list(shape)}.",
                    field="path",
                    hint="Load it on the model it was trained on.",
                )
        roles.add(target.role)
    if not roles:
        raise corrupt(folder / WEIGHTS, "has no LoRA tensors")
    return roles


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


def corrupt(path: Path, what: str) -> CheckpointCorruptError:
    """Of a file of a checkpoint."""
    return CheckpointCorruptError(
        f"{path.name} in {path.parent.name} {what}.", field="path", hint="Use another checkpoint."
    )
