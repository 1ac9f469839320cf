"""LoRA adapters (Hu et al., arXiv:2106.09685), and the layers of a model that they can change.

Beside its low-rank updates an adapter may have a scalar head.

A run trains one `Adapter`; the sampler holds frozen copies. `weaver.engine.torch.linear` applies
them. Shapes: R rank; A [R, in], B [out, R], scale alpha / R.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from weaver.errors import InvalidParamsError, UnsupportedError
from weaver.types import LoraConfig

Role = Literal["attn", "mlp", "unembed"]
PREFIX = "base_model.model."
"""PEFT's tensor names begin so."""
SCORE = "score"
"""What transformers calls the head of its models for sequence classification."""
SCORE_WEIGHT = f"{PREFIX}{SCORE}.weight"


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    a: torch.Tensor
    """[R, in]"""
    b: torch.Tensor
    """[out, R]"""


class Block:
    """What an adapter has for layers that are given the same input; views of it, never copies."""

    def __init__(self, pairs: Sequence[LoraPair | None], scale: float) -> None:
        """`pairs` has one entry a layer; None where the adapter does not change it."""
        self.scale = scale
        self.pairs = [pair for pair in pairs if pair is not None]
        self.members: list[tuple[int, slice, torch.Tensor]] = []
        """For each layer that it changes: its index, its columns of x A^T, and B^T [R, out]."""
        self.rank = 0
        """The sum of R."""
        for index, pair in enumerate(pairs):
            if pair is not None:
                start, self.rank = self.rank, self.rank + len(pair.a)
                self.members.append((index, slice(start, self.rank), pair.b.detach().t()))
        self._a = _side_by_side([pair.a.detach() for pair in self.pairs])

    def a_t(self) -> torch.Tensor:
        """A^T of all these layers: [in, sum of R]"""
        if self._a is not None:
            return self._a.t()
        return torch.cat([pair.a.detach() for pair in self.pairs]).t()


def _side_by_side(matrices: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One matrix of the rows of several, where they follow each other in memory."""
    first, end = matrices[0], matrices[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for each in matrices:
        follows = each.untyped_storage().data_ptr() == storage and each.storage_offset() == end
        if not (follows and each.is_contiguous() and each.shape[1:] == first.shape[1:]):
            return None
        end += each.numel()
    return first.as_strided((sum(map(len, matrices)), *first.shape[1:]), first.stride())


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """Low-rank updates by the path of the linear layer: `model.layers.0.self_attn.q_proj`."""

    pairs: Mapping[str, LoraPair]
    scale: float
    frozen: bool = False
    """Whether no value ever changes."""
    score: torch.Tensor | None = None
    """float32 [1, H]: a scalar head, in place of the model's own for tokens."""
    _blocks: dict[tuple[str, ...], Block | None] = field(default_factory=dict, init=False)

    def block(self, paths: tuple[str, ...]) -> Block | None:
        """What it has for these layers, of one input; None is nothing."""
        if paths not in self._blocks:
            pairs = [self.pairs.get(path) for path in paths]
            self._blocks[paths] = Block(pairs, self.scale) if any(pairs) else None
        return self._blocks[paths]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By PEFT's names, `base_model.model.<path>.lora_A.weight`; not copies."""
        named: dict[str, torch.Tensor] = {}
        for path, pair in self.pairs.items():
            named[f"{PREFIX}{path}.lora_A.weight"] = pair.a
            named[f"{PREFIX}{path}.lora_B.weight"] = pair.b
        return named if self.score is None else named | {SCORE_WEIGHT: self.score}


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
    unembed = config.train_unembed and config.head is None
    return {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": unembed}


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
    targets: Sequence[Target],
    config: LoraConfig,
    *,
    seed: int,
    device: torch.device,
    hidden_size: int = 0,
) -> Adapter:
    """A trainable fp32 adapter with PEFT's initial values: A kaiming-uniform (a = √5), B zero.

    A scalar head, which needs H, `hidden_size`, is normal, of variance 1 / (H + 1) (Stiennon et
    al., arXiv:2009.01325). The values depend on `seed` and the targets alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        bound = target.in_features**-0.5
        stem = f"{PREFIX}{target.path}"
        tensors[f"{stem}.lora_A.weight"] = torch.empty(
            config.rank, target.in_features, dtype=torch.float32
        ).uniform_(-bound, bound, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(
            target.out_features, config.rank, dtype=torch.float32
        )
    pairs = pairs_of(tensors, device=device, dtype=torch.float32)
    score = None
    if config.head is not None:
        drawn = (
            torch.randn(1, hidden_size, generator=generator, dtype=torch.float32)
            * (hidden_size + 1) ** -0.5
        )
        score = drawn.to(device)
    adapter = Adapter(pairs, config.alpha / config.rank, score=score)
    for tensor in adapter.tensors().values():
        tensor.requires_grad_()
    return adapter


def adapter_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """A frozen adapter from tensors by PEFT's names; its B share storage where they can."""
    pairs, score = pairs_of(tensors, device=device, dtype=dtype), tensors.get(SCORE_WEIGHT)
    if score is not None:
        score = score.detach().to(device, torch.float32)
    return Adapter(pairs, config.alpha / config.rank, frozen=True, score=score)


def pairs_of(
    tensors: Mapping[str, torch.Tensor], *, device: torch.device, dtype: torch.dtype
) -> dict[str, LoraPair]:
    """Tensors by PEFT's names as pairs by path; the B share storage where they can.

    All A are copied behind each other, so that a `Block` needs no copies of its own.
    """
    stems = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    given = [tensors[f"{stem}.lora_A.weight"].detach() for stem in stems]
    flat = torch.empty(sum(a.numel() for a in given), device=device, dtype=dtype)
    pairs: dict[str, LoraPair] = {}
    end = 0
    for stem, values in zip(stems, given, strict=True):
        start, end = end, end + values.numel()
        a = flat[start:end].view(values.shape).copy_(values).detach()
        b = tensors[f"{stem}.lora_B.weight"].detach().to(device, dtype)
        pairs[stem.removeprefix(PREFIX)] = LoraPair(a, b)
    return pairs
