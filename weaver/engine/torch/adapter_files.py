"""LoRA adapters in files, as PEFT keeps them: written for checkpoints, and read.

The sampler and imports read also those that PEFT itself wrote. A scalar head is what PEFT calls a
module to save, of a model for sequence classification. R rank; A [R, in], B [out, R]; H hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weaver import errors
from weaver.engine.torch import files
from weaver.engine.torch.catalog import ModelFacts
from weaver.engine.torch.lora import PREFIX, SCORE, SCORE_WEIGHT
from weaver.types import LoraConfig

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
    "modules_to_save": (None, [], [SCORE], ["classifier", SCORE]),
}
"""Settings, and the values under which an adapter is what `Adapter` is."""
NEUTRAL: tuple[object, ...] = (None, False, [], {})
"""The values of every other setting under which it changes nothing, and PEFT's defaults of them."""


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, config: LoraConfig, base: str
) -> None:
    """`tensors` by PEFT's names; `base` is what they call the model below."""
    leaves = {name.rsplit(".", 3)[1] for name in tensors if name != SCORE_WEIGHT}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.head else "CAUSAL_LM",
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
        "modules_to_save": [SCORE] if config.head else None,
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
    settings = files.read_json(folder / ADAPTER_CONFIG)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise files.corrupt(folder / ADAPTER_CONFIG, "lacks r or lora_alpha")
    _check_settings(settings)
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # PEFT scales it by alpha / sqrt(r)
    tensors = _lora_tensors(files.read_tensors(folder / ADAPTER_WEIGHTS), facts)
    score = tensors.get(SCORE_WEIGHT)
    _check_score(score, settings, facts, folder)
    roles = _check_fit(tensors, rank, facts, folder)
    return tensors, LoraConfig(
        rank=rank,
        alpha=alpha,
        train_attn="attn" in roles,
        train_mlp="mlp" in roles,
        train_unembed="unembed" in roles or score is not None,
        head=None if score is None else "scalar",
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
    """Those of LoRA and the scores' head, in fp32; all others have to be copies of the base's.

    PEFT adds copies of the base's embeddings where lm_head is adapted, and reads them back.
    """
    lora: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name == SCORE_WEIGHT or name.endswith((".lora_A.weight", ".lora_B.weight")):
            lora[name] = tensor.float()
            continue
        base = files.stored_tensor(facts, name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None or not torch.equal(base.to(tensor.dtype), tensor):
            raise _not_plain(
                f"{name}, which is neither LoRA's nor what {facts.info.name} has there."
            )
    return lora


def _check_score(
    score: torch.Tensor | None, settings: Mapping[str, Any], facts: ModelFacts, folder: Path
) -> None:
    """The head has to be there where the settings say so, and give one number."""
    labels, hidden = score.shape if score is not None and score.ndim == 2 else (0, 0)
    if score is not None and labels != 1:
        raise _not_plain(f"{SCORE_WEIGHT} of shape {list(score.shape)}: not one number a sequence.")
    if (score is not None) != bool(settings.get("modules_to_save")):
        raise files.corrupt(folder / ADAPTER_WEIGHTS, f"and its settings differ in {SCORE_WEIGHT}")
    if score is not None and hidden != facts.config.hidden_size:
        raise _of_another(
            f"{SCORE_WEIGHT} has {hidden} columns, {facts.info.name} {facts.config.hidden_size}."
        )


def _check_fit(
    tensors: Mapping[str, torch.Tensor], rank: int, facts: ModelFacts, folder: Path
) -> set[str]:
    """The roles of the adapted layers, after checking every tensor's name and shape."""
    roles: set[str] = set()
    stems = {name.rsplit(".lora_", 1)[0] for name in tensors if name != SCORE_WEIGHT}
    for stem in sorted(stems):
        target = facts.targets.get(stem.removeprefix(PREFIX))
        if target is None:
            raise _of_another(f"the adapter changes {stem}, {facts.info.name} has no such layer.")
        shapes = {"A": (rank, target.in_features), "B": (target.out_features, rank)}
        for matrix, shape in shapes.items():
            tensor = tensors.get(f"{stem}.lora_{matrix}.weight")
            if tensor is None:
                raise files.corrupt(folder / ADAPTER_WEIGHTS, f"lacks {stem}.lora_{matrix}.weight")
            if tuple(tensor.shape) != shape:
                raise _of_another(
                    f"{stem}.lora_{matrix} has shape {list(tensor.shape)}, "
                    f"{facts.info.name} needs {list(shape)}."
                )
        roles.add(target.role)
    if not roles:
        raise files.corrupt(folder / ADAPTER_WEIGHTS, "has no LoRA tensors")
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
