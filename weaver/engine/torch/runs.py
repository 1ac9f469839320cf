"""`Run`: the weights, gradient and optimizer of one model in training, and its checkpoints on disk.

The trainer holds the runs. A checkpoint is a folder:

| file                                            | of               | holds                    |
|-------------------------------------------------|------------------|--------------------------|
| weaver_state.json                               | every checkpoint | `State`                  |
| adapter_config.json, adapter_model.safetensors  | LoRA             | PEFT's layout            |
| config.json, model.safetensors, tokenizer files | full fine-tuning | transformers' layout     |
| optimizer.safetensors                           | with optimizer   | Adam's moments, its step |

The sampler reads such folders, and those of PEFT and transformers, with `read_snapshot`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from weaver import errors
from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch import adapters, models
from weaver.types import LoraConfig, TrainingMode, Value

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.lora import Adapter
    from weaver.types import AdamParams

STATE = "weaver_state.json"
OPTIMIZER = "optimizer.safetensors"
ADAM_STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


class State(Value):
    """What weaver_state.json says."""

    base_model: str
    architecture: str
    vocab_size: int
    num_parameters: int
    """Of the base model."""
    training_mode: TrainingMode
    lora_config: LoraConfig | None
    step: int


@dataclass(slots=True, eq=False)
class Run:
    """Parameters are float32. A LoRA run shares `model`; a full fine-tuning run owns it."""

    run_id: str
    model: models.LoadedModel
    lora_config: LoraConfig | None = None
    adapter: Adapter | None = None
    step: int = 0
    gradient: list[torch.Tensor] | None = None
    """Accumulated over calls, one for each parameter; None before the first."""
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self._reset_optimizer()

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Trained tensors by PEFT's names, or by the model's own."""
        if self.adapter is not None:
            return self.adapter.tensors()
        return dict(self.model.module.named_parameters())

    def parameters(self) -> list[torch.Tensor]:
        return list(self.named_parameters().values())

    def _reset_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters(), fused=True)

    def accumulate(self, gradient: list[torch.Tensor]) -> None:
        """Adds to the gradient of the next step; takes the tensors over."""
        self.gradient = added(self.gradient, gradient)

    def optim_step(self, params: AdamParams) -> float:
        """AdamW on the accumulated gradient, clipped to a global norm; answers the norm before.

        Raises:
            NoGradientsError: nothing was accumulated.
            NonFiniteError: the gradient is not finite; it is cleared, nothing else changes.
        """
        if self.gradient is None:
            raise errors.NoGradientsError(
                f"run {self.run_id} has no gradient.", hint="Call forward_backward first."
            )
        gradient, self.gradient = self.gradient, None
        norm = torch.nn.utils.get_total_norm(gradient)
        if not torch.isfinite(norm):
            raise errors.NonFiniteError(
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

    def save(self, folder: Path, *, include_optimizer: bool) -> None:
        """Writes a checkpoint into an empty folder.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing was written.
            StorageError: the disk is full or not writable.
        """
        tensors = self.named_parameters()
        models.check_finite(tensors)
        try:
            if self.lora_config is not None:
                base = self.model.facts.public_name
                adapters.write_adapter(folder, tensors, config=self.lora_config, base=base)
            else:
                with models.without_progress_bars():
                    self.model.module.save_pretrained(folder)
                self._write_tokenizer(folder)
            if include_optimizer:
                save_file(self._optimizer_tensors(), folder / OPTIMIZER)
            state = self._state().model_dump()
            (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise errors.StorageError(
                f"cannot write {folder.name}: {getattr(error, 'strerror', None) or error}",
                hint="Free some space or check the permissions.",
            ) from error

    def load(self, folder: Path, *, include_optimizer: bool) -> None:
        """Replaces weights and step, restores or resets the optimizer, clears the gradient.

        Raises:
            CheckpointMismatchError: of another base model, mode, rank or scale, or without
                optimizer state where it is asked; before anything changed.
            CheckpointCorruptError: a file is missing or broken; before anything changed.
        """
        state = read_state(folder)
        self._check_same(state)
        snapshot = read_snapshot(folder, facts=self.model.facts)
        parameters = self.named_parameters()
        models.check_weights(parameters, snapshot.tensors)
        moments = self._read_optimizer(folder) if include_optimizer else None
        models.set_weights(parameters, snapshot.tensors)
        self.step = state.step
        self.gradient = None
        self._reset_optimizer()
        if moments is not None:
            self._restore_optimizer(moments)

    def _state(self) -> State:
        info = self.model.info
        return State(
            base_model=info.name,
            architecture=info.architecture,
            vocab_size=info.vocab_size,
            num_parameters=info.num_parameters,
            training_mode="lora" if self.lora_config else "full_ft",
            lora_config=self.lora_config,
            step=self.step,
        )

    def _check_same(self, state: State) -> None:
        ours = _described(self._state())
        for name, theirs in _described(state).items():
            if theirs != ours[name]:
                raise errors.CheckpointMismatchError(
                    f"the checkpoint has {name} {theirs!r}, the run {ours[name]!r}.",
                    field="path",
                    hint="Create a run like the checkpoint's, then load it.",
                )

    def _write_tokenizer(self, folder: Path) -> None:
        try:
            files = self.model.facts.tokenizer_files()
        except errors.UnsupportedError:
            return  # the base model has none either
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {ADAM_STEP: torch.zeros(())}
        for name, parameter in self.named_parameters().items():
            for key, value in self.optimizer.state[parameter].items():
                stored = key if key == ADAM_STEP else f"{name}.{key}"
                tensors[stored] = value.detach().cpu().contiguous()
        return tensors

    def _read_optimizer(self, folder: Path) -> dict[str, torch.Tensor]:
        if not (folder / OPTIMIZER).exists():
            raise errors.CheckpointMismatchError(
                f"{folder.name} was saved without optimizer state.",
                field="path",
                hint="Load it with load_state, or save with save_state.",
            )
        tensors = adapters.read_tensors(folder / OPTIMIZER)
        stepped = ADAM_STEP in tensors and float(tensors[ADAM_STEP]) > 0
        expected: Mapping[str, torch.Size] = {
            f"{name}.{key}": parameter.shape
            for name, parameter in self.named_parameters().items()
            for key in MOMENTS
            if stepped
        } | {ADAM_STEP: torch.Size()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise adapters.corrupt(folder / OPTIMIZER, "does not fit the weights beside it")
        return tensors

    def _restore_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if float(tensors[ADAM_STEP]) == 0:
            return
        for name, parameter in self.named_parameters().items():
            self.optimizer.state[parameter] = {
                ADAM_STEP: tensors[ADAM_STEP].clone().to(parameter.device),
                **{key: tensors[f"{name}.{key}"].to(parameter.device) for key in MOMENTS},
            }


def added(total: list[torch.Tensor] | None, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """`total` plus `parts`, in the place of `total` where there is one."""
    if total is None:
        return parts
    torch._foreach_add_(total, parts)
    return total


def read_snapshot(folder: Path, *, facts: ModelFacts) -> WeightSnapshot:
    """The weights of a folder: of ours, one that PEFT wrote, or a whole model of this architecture.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError
        UnsupportedError: a variant of LoRA.
    """
    version = read_state(folder).step if (folder / STATE).exists() else 0
    tensors, config = (
        adapters.read_adapter(folder, facts=facts)
        if (folder / adapters.ADAPTER_CONFIG).exists()
        else (_read_model(folder), None)
    )
    return WeightSnapshot(
        base_model=facts.info.name,
        lora_config=config,
        version=version,
        tensors=tensors,
    )


def read_state(folder: Path) -> State:
    """What a checkpoint says of itself.

    Raises:
        CheckpointCorruptError: weaver_state.json is missing or broken.
    """
    try:
        return State(**adapters.read_json(folder / STATE))
    except errors.InvalidParamsError as error:
        raise adapters.corrupt(folder / STATE, f"is broken: {error}") from error


def _described(state: State) -> dict[str, Any]:
    """What must agree; the seed of the initial values need not."""
    values = state.model_dump(exclude={"step", "lora_config"})
    lora = state.lora_config.model_dump(exclude={"seed"}) if state.lora_config else {}
    return values | {f"lora_config.{name}": value for name, value in lora.items()}


def _read_model(folder: Path) -> dict[str, torch.Tensor]:
    try:
        module = models.read_module(folder, name=str(folder), config=None, dtype=torch.float32)
    except errors.UnsupportedError as error:
        raise adapters.corrupt(
            folder / "model.safetensors", f"is broken: {error.message}"
        ) from error
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
