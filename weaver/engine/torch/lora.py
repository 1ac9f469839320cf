"""LoRA adapters (Hu et al., arXiv:2106.09685), and the layers of a model that they can change.

A run trains one `Adapter`; the sampler holds frozen copies. `weaver.engine.torch.linear` applies
them. Shapes: R rank; A [R, in], B [out, R], scale alpha / R.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from weaver.errors import InvalidParamsError, UnsupportedError
from weaver.types import LoraConfig

Role = Literal["attn", "mlp", "unembed"]
PREFIX = "base_model.model."
"""PEFT's tensor names begin so."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    a: torch.Tensor
    """[R, in]"""
    b: torch.Tensor
    """[out, R]"""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Low-rank updates by the path of the linear layer: `model.layers.0.self_attn.q_proj`."""

    pairs: Mapping[str, LoraPair]
    scale: float

    def tensors(self) -> dict[str, torch.Tensor]:
        """By PEFT's names, `base_model.model.<path>.lora_A.weight`; not copies."""
        named: dict[str, torch.Tensor] = {}
        for path, pair in self.pairs.items():
            named[f"{PREFIX}{path}.lora_A.weight"] = pair.a
            named[f"{PREFIX}{path}.lora_B.weight"] = pair.b
        return named


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that an adapter can change."""

    path: str
    role: Role
    out_features: int
    in_features: int


def find_targets(model: torch.nn.Module, head: torch.nn.Module) -> dict[str, Target]:
    """The adaptable linear layers by path: `head`, and those in an attention or MLP module.

    A mixture's router and shared-expert gate belong to neither and are never adapted.
    """
    targets: dict[str, Target] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        parent = type(model.get_submodule(path.rpartition(".")[0])).__name__
        role: Role | None = None
        if module is head:
            role = "unembed"
        elif "Attention" in parent:
            role = "attn"
        elif "MLP" in parent or "Mlp" in parent:
            role = "mlp"
        if role:
            targets[path] = Target(path, role, module.out_features, module.in_features)
    return targets


def has_fused_experts(model: torch.nn.Module) -> bool:
    """transformers 5 keeps a mixture's experts as [experts, out, in] tensors, not linear layers."""
    return any(p.ndim == 3 and "experts" in name for name, p in model.named_parameters())


def roles(config: LoraConfig) -> dict[Role, bool]:
    """Which of them `config` trains."""
    return {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}


def choose_targets(
    targets: Iterable[Target], config: LoraConfig, *, model: str, fused_experts: bool
) -> list[Target]:
    """Those of a model's layers that `config` asks to train.

    Raises:
        UnsupportedError: a group has no linear layers, or its experts are fused.
        InvalidParamsError: no group is asked, or the rank exceeds a layer's smaller side.
    """
    asked = roles(config)
    if not any(asked.values()):
        raise InvalidParamsError(
            "trains nothing.", field="lora_config", hint="Leave one of train_* on."
        )
    if config.train_mlp and fused_experts:
        raise UnsupportedError(
            f"{model} keeps its experts as fused tensors, which LoRA does not adapt here.",
            field="lora_config.train_mlp",
            hint="Set train_mlp=False.",
        )
    chosen = [target for target in targets if asked[target.role]]
    for role, wanted in asked.items():
        if wanted and not any(target.role == role for target in chosen):
            raise UnsupportedError(
                f"{model} has no linear layers of this group.",
                field=f"lora_config.train_{role}",
                hint=f"Set train_{role}=False.",
            )
    smallest = min(chosen, key=lambda t: min(t.in_features, t.out_features))
    limit = min(smallest.in_features, smallest.out_features)
    if config.rank > limit:
        raise InvalidParamsError(
            f"is {config.rank}; {smallest.path} of {model} is "
            f"{smallest.out_features} x {smallest.in_features}.",
            field="lora_config.rank",
            hint=f"Use at most {limit}.",
        )
    return chosen


def new_adapter(
    targets: Sequence[Target], config: LoraConfig, *, seed: int, device: torch.device
) -> Adapter:
    """A trainable fp32 adapter with PEFT's initial values: A kaiming-uniform (a = √5), B zero.

    The values depend on `seed` and the targets alone.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, LoraPair] = {}
    for target in targets:
        bound = target.in_features**-0.5
        a = torch.empty(config.rank, target.in_features).uniform_(
            -bound, bound, generator=generator
        )
        b = torch.zeros(target.out_features, config.rank)
        pairs[target.path] = LoraPair(a.to(device).requires_grad_(), b.to(device).requires_grad_())
    return Adapter(pairs, config.alpha / config.rank)


def adapter_from_tensors(
    tensors: Mapping[str, torch.Tensor], config: LoraConfig, *, device: torch.device
) -> Adapter:
    """A frozen fp32 adapter from tensors by PEFT's names; it shares storage where it can."""
    pairs: dict[str, LoraPair] = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = tensors[f"{stem}.lora_B.weight"]
            pairs[stem.removeprefix(PREFIX)] = LoraPair(
                *(t.detach().to(device, torch.float32) for t in (a, b))
            )
    return Adapter(pairs, config.alpha / config.rank)
