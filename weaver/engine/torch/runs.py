"""`Run`: the weights, gradient and optimizer of one model in training; the trainer holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from weaver.engine.base import WeightSnapshot
from weaver.errors import NoGradientsError, NonFiniteError

if TYPE_CHECKING:
    from weaver.engine.torch.lora import Adapter
    from weaver.engine.torch.models import LoadedModel
    from weaver.types import AdamParams, LoraConfig


@dataclass(slots=True, eq=False)
class Run:
    """Parameters are float32. A LoRA run shares `model`; a full fine-tuning run owns it."""

    run_id: str
    model: LoadedModel
    lora_config: LoraConfig | None = None
    adapter: Adapter | None = None
    step: int = 0
    gradient: list[torch.Tensor] | None = None
    """Accumulated over calls, one for each parameter; None before the first."""
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.reset_optimizer()

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Trained tensors by PEFT's names, or by the model's own."""
        if self.adapter is not None:
            return self.adapter.tensors()
        return dict(self.model.module.named_parameters())

    def parameters(self) -> list[torch.Tensor]:
        return list(self.named_parameters().values())

    def reset_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters(), fused=True)

    def optim_step(self, params: AdamParams) -> float:
        """AdamW on the accumulated gradient, clipped to a global norm; answers the norm before.

        Raises:
            NoGradientsError: nothing was accumulated.
            NonFiniteError: the gradient is not finite; it is cleared, nothing else changes.
        """
        if self.gradient is None:
            raise NoGradientsError(
                f"run {self.run_id} has no gradient.", hint="Call forward_backward first."
            )
        gradient, self.gradient = self.gradient, None
        norm = torch.nn.utils.get_total_norm(gradient)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient's norm is {norm.item()}; the step was not taken.",
                hint="The gradient is cleared. Check the data, or lower the learning rate.",
            )
        parameters = self.parameters()
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part
        if params.grad_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, params.grad_clip_norm, norm)
        self.optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(norm)

    def snapshot(self) -> WeightSnapshot:
        """A copy that no later step changes."""
        return WeightSnapshot(
            base_model=self.model.info.name,
            lora_config=self.lora_config,
            version=self.step,
            tensors={n: p.detach().clone() for n, p in self.named_parameters().items()},
        )


def added(total: list[torch.Tensor] | None, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """`total` plus `parts`, in the place of `total` where there is one."""
    if total is None:
        return parts
    torch._foreach_add_(total, parts)
    return total
