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

from weaver.engine.lora import PREFIX
from weaver.errors import CheckpointCorruptError, CheckpointMismatchError, UnsupportedError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.catalog import ModelFacts

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "layer_replication": (None,),
}
"""Settings of adapter_config.json and the values under which an adapter is what `Adapter` is."""


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
        UnsupportedError: a variant of LoRA, such as DoRA.
    """
    settings = read_json(folder / CONFIG)
    for name, plain in PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise UnsupportedError(
                f"the adapter has {name} = {settings[name]!r}.",
                field="model_path",
                hint="Only plain LoRA adapters are read.",
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise corrupt(folder / CONFIG, "lacks r or lora_alpha")
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # PEFT scales it by alpha / sqrt(r)
    tensors = {
        name: tensor.float()
        for name, tensor in read_tensors(folder / WEIGHTS).items()
        if ".lora_" in name  # PEFT adds copies of the base's embeddings when lm_head is adapted
    }
    roles = _check_fit(tensors, rank, facts, folder)
    return tensors, LoraConfig(
        rank=rank,
        alpha=alpha,
        train_attn="attn" in roles,
        train_mlp="mlp" in roles,
        train_unembed="unembed" in roles,
    )


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
