"""`Run`: one model in training, as `TorchTrainer` has it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from weaver import types
from weaver.engine.torch import checkpoints
from weaver.engine.torch.catalog import ModelFacts
from weaver.engine.torch.lora import Adapter
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.shards import Parts


@dataclass(slots=True, eq=False)
class Run:
    """A model in training: its weights, gradient and optimizer. Parameters are float32.

    A LoRA run shares a base model, which need not be in memory between its passes.
    """

    facts: ModelFacts
    """Of the base model."""
    lora_config: types.LoraConfig | None = None
    adapter: Adapter | None = None
    own: LoadedModel | None = None
    """That of a full fine-tuning run."""
    quantize: types.Quantize = "none"
    """How frozen layers of its base are kept."""
    step: int = 0
    gradient: list[torch.Tensor] | None = None
    """Accumulated over calls, one for each parameter; None before the first."""
    optimizer: torch.optim.AdamW = field(init=False)

    @property
    def training_mode(self) -> types.TrainingMode:
        return "full_ft" if self.adapter is None else "lora"

    @property
    def head(self) -> types.Head | None:
        return self.lora_config.head if self.lora_config else None

    def __post_init__(self) -> None:
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters(), fused=True)

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Trained tensors by PEFT's names, or by the model's own."""
        if self.adapter is not None:
            return self.adapter.tensors()
        assert self.own is not None, "a run without an adapter has a model of its own"
        if self.own.parts is not None:
            return self.own.parts.trained
        return dict(self.own.module.named_parameters())

    @property
    def parts(self) -> Parts | None:
        """Where what it trains is divided among processes, so that all tensors here are parts."""
        return None if self.own is None else self.own.parts

    @property
    def shares(self) -> object:
        """What runs that can be in one pass have in common."""
        return self.own or self.facts.info.name

    def parameters(self) -> list[torch.Tensor]:
        return list(self.named_parameters().values())

    def state(self) -> checkpoints.State:
        return checkpoints.State.of(
            self.facts.info, self.lora_config, step=self.step, quantize=self.quantize
        )
