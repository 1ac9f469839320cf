"""Checkpoints of runs: their folders, and what is in them.

`Run` writes and loads them; the sampler reads them, and folders of PEFT and transformers, with
`read_snapshot`.

| file                                            | of               | holds                    |
|-------------------------------------------------|------------------|--------------------------|
| weaver_state.json                               | every checkpoint | `State`                  |
| adapter_config.json, adapter_model.safetensors  | LoRA             | PEFT's layout            |
| config.json, model.safetensors, tokenizer files | full fine-tuning | transformers' layout     |
| optimizer.safetensors                           | with optimizer   | Adam's moments, its step |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from weaver import errors
from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch import files
from weaver.engine.torch.adapter_files import ADAPTER_CONFIG, read_adapter, write_adapter
from weaver.engine.torch.catalog import ModelFacts
from weaver.engine.torch.shards import Parts
from weaver.types import LoraConfig, ModelInfo, Quantize, TrainingMode, Value

logger = logging.getLogger(__name__)

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
    """That of the base model."""
    training_mode: TrainingMode
    lora_config: LoraConfig | None
    step: int
    quantize: Quantize = "none"
    """How the base's layers were kept while it was trained."""

    @classmethod
    def of(
        cls, info: ModelInfo, lora_config: LoraConfig | None, *, step: int, quantize: Quantize
    ) -> State:
        return cls(
            base_model=info.name,
            architecture=info.architecture,
            vocab_size=info.vocab_size,
            num_parameters=info.num_parameters,
            training_mode="lora" if lora_config else "full_ft",
            lora_config=lora_config,
            step=step,
            quantize=quantize,
        )

    def check_same(self, other: State) -> None:
        """Raises CheckpointMismatchError where a run of this state cannot load a checkpoint's."""
        ours, theirs = self._described(), other._described()
        for name, value in theirs.items():
            if value != ours[name]:
                raise errors.CheckpointMismatchError(
                    f"the checkpoint has {name} {value!r}, the run {ours[name]!r}.",
                    field="path",
                    hint="Create a run like the checkpoint's, then load it.",
                )

    def _described(self) -> dict[str, Any]:
        """What must agree; the seed of the initial values need not."""
        values = self.model_dump(exclude={"step", "lora_config", "quantize"})
        lora = self.lora_config.model_dump(exclude={"seed"}) if self.lora_config else {}
        return values | {f"lora_config.{name}": value for name, value in lora.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copy:
    """A run as it was, on the host, for `write` in any thread."""

    state: State
    facts: ModelFacts
    module: Any
    """transformers' model of full fine-tuning, to write its files; else None."""
    weights: Mapping[str, torch.Tensor]
    """Of LoRA by PEFT's names, else all that the model's files hold."""
    optimizer: Mapping[str, torch.Tensor] | None
    """What optimizer.safetensors holds."""

    def write(self, folder: Path) -> None:
        """Makes a checkpoint of an empty folder.

        Raises:
            StorageError: the disk is full or not writable.
        """
        state = self.state
        try:
            if state.lora_config is not None:
                base = self.facts.origin
                write_adapter(folder, self.weights, config=state.lora_config, base=base)
            else:
                with files.without_progress_bars():
                    self.module.save_pretrained(
                        folder,
                        state_dict=dict(self.weights),
                        max_shard_size=files.SHARD_BYTES,
                    )
                with suppress(errors.UnsupportedError):  # the base model has no tokenizer either
                    write_tokenizer(self.facts, folder)
            if self.optimizer is not None:
                save_file(dict(self.optimizer), folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state.model_dump(), indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise errors.StorageError(
                f"cannot write {folder.name}: {getattr(error, 'strerror', None) or error}",
                hint="Free some space or check the permissions.",
            ) from error


def copy_of(
    state: State,
    *,
    facts: ModelFacts,
    module: Any,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> Copy:
    """What a checkpoint holds, copied.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    files.check_finite(parameters)
    weights = parameters if state.lora_config else module.state_dict()
    return Copy(
        state=state,
        facts=facts,
        module=module,
        weights=_copied(weights),
        optimizer=None if optimizer is None else _optimizer_tensors(optimizer, parameters),
    )


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the host; those that share their values still do."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in tensors.values():
        if (place := (tensor.data_ptr(), tensor.shape)) not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True).contiguous()
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}


def write_tokenizer(facts: ModelFacts, folder: Path) -> None:
    """As `save_pretrained` does; UnsupportedError where the model has none."""
    for name, content in facts.tokenizer_files().items():
        (folder / name).write_bytes(content)


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    tensors = {ADAM_STEP: torch.zeros((), dtype=torch.float32)}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            stored = key if key == ADAM_STEP else f"{name}.{key}"
            tensors[stored] = value
    return _copied(tensors)


Moments = dict[torch.Tensor, dict[str, torch.Tensor]]
"""The optimizer's state of each parameter."""


def read_optimizer(
    folder: Path, parameters: Mapping[str, torch.Tensor], *, parts: Parts | None = None
) -> Moments:
    """Those of `parameters`, which are `parts` where these are given; none before the first step.

    Raises:
        CheckpointMismatchError: it was not saved.
        CheckpointCorruptError: the file is broken, or of other parameters.
    """
    if not (folder / OPTIMIZER).exists():
        raise errors.CheckpointMismatchError(
            f"{folder.name} was saved without optimizer state.",
            field="path",
            hint="Load it with load_state, or save with save_state.",
        )
    cut = None if parts is None else parts.cut_moment
    tensors = files.read_tensors(folder / OPTIMIZER, cut=cut)
    step = tensors.get(ADAM_STEP, torch.zeros((), dtype=torch.float32))
    stepped = parameters if bool((step > 0).all()) else {}
    expected = {f"{name}.{key}": p.shape for name, p in stepped.items() for key in MOMENTS}
    if expected | {ADAM_STEP: torch.Size()} != {n: t.shape for n, t in tensors.items()}:
        raise files.corrupt(folder / OPTIMIZER, "does not fit the weights beside it")
    return {
        parameter: {
            ADAM_STEP: step.clone().to(parameter.device),
            **{key: tensors[f"{name}.{key}"].to(parameter.device) for key in MOMENTS},
        }
        for name, parameter in stepped.items()
    }


def read_snapshot(
    folder: Path, *, facts: ModelFacts, quantize: Quantize, parts: Parts | None = None
) -> WeightSnapshot:
    """The weights of a folder: of ours, one that PEFT wrote, or a whole model of this architecture.

    Of a whole model, these `parts` alone, where they are given.

    A warning tells of an adapter that was trained on a base kept in another way than `quantize`.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError
        UnsupportedError: a variant of LoRA.
    """
    version = 0
    if (folder / STATE).exists():
        state = read_state(folder)
        version = state.step
        if state.lora_config is not None and state.quantize != quantize:
            said = "%s was trained with quantize=%s; here it is %s, which changes what it computes"
            logger.warning(said, folder.name, state.quantize, quantize)
    tensors, config = (
        read_adapter(folder, facts=facts)
        if (folder / ADAPTER_CONFIG).exists()
        else (_read_model(folder, parts), None)
    )
    return WeightSnapshot(
        base_model=facts.info.name, lora_config=config, version=version, tensors=tensors
    )


def read_state(folder: Path) -> State:
    """What a checkpoint says of itself.

    Raises:
        CheckpointCorruptError: weaver_state.json is missing or broken.
    """
    try:
        return State(**files.read_json(folder / STATE))
    except errors.InvalidParamsError as error:
        raise files.corrupt(folder / STATE, f"is broken: {error}") from error


def _read_model(folder: Path, parts: Parts | None) -> dict[str, torch.Tensor]:
    cut = None if parts is None else parts.cut
    try:
        module = files.read_module(
            folder, name=str(folder), config=None, dtype=torch.float32, change=cut
        )
    except errors.UnsupportedError as error:
        raise files.corrupt(folder / files.WEIGHTS, f"is broken: {error.message}") from error
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
