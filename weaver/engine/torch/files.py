"""Weights in files: whole models as transformers keeps them.

`ModelStore` reads models, and checkpoints are written and read through here. Adapters are those of
`adapter_files`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file, logging

from weaver import errors
from weaver.engine.torch.catalog import ModelFacts, only_here, refusing
from weaver.engine.torch.device import CPU, take_from_files
from weaver.engine.torch.packing import ATTENTION
from weaver.engine.torch.shards import is_divided, local

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Of weights in one file of a whole model, as the hub's own client makes them."""
FLOATS = {"F64", "F32", "F16", "BF16"}


def read_module(
    source: str | Path,
    *,
    name: str,
    config: Any | None,
    dtype: torch.dtype,
    device: torch.device = CPU,
    change: Callable[[Any], None] | None = None,
) -> Any:
    """transformers' model of a folder or cached id, complete and from safetensors.

    `change` may replace or divide layers of the model while its weights are views of the files, in
    the dtype that they have there.

    Raises:
        UnsupportedError: its weights cannot be read; speaks of it as `name`.
        torch.OutOfMemoryError: the device has not enough.
    """
    reading = refusing(
        f"the weights of {name} cannot be read",
        hint="Weights must be complete safetensors files that fit the config.json beside them.",
    )
    with reading, without_progress_bars():
        module, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype if change is None else "auto",
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=only_here(str(source)),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        quantised = weight_without_fractions(folder_of(str(source)))
    if quantised is not None:
        raise _damaged(name, f"are quantised: {quantised} is not of floats.")
    for parameter, stored, wanted in sorted(report["mismatched_keys"]):
        raise _damaged(
            name, f"do not fit config.json: {parameter} is {list(stored)}, not {list(wanted)}."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise _damaged(name, f"lack {missing[0]} ({len(missing)} in all).")
    layers = dict(module.named_modules())
    for unknown in sorted(report["unexpected_keys"]):  # a bias, or a scale of quantised weights
        layer = layers.get(unknown.rpartition(".")[0])
        if layer is not None and any(True for _ in layer.parameters(recurse=False)):
            raise _damaged(name, f"have {unknown}, which config.json does not.")
    try:
        if change is not None:
            stored = module.dtype
            change(module)
        others = [p for p in module.parameters() if not is_divided(p)]
        take_from_files(others, device)
        module.to(device)  # its buffers
        if change is not None:
            for tensor in others:
                if tensor.dtype == stored:  # others are those that an architecture keeps in float32
                    tensor.data = tensor.data.to(dtype)
        check_finite(dict(module.named_parameters()))
    except errors.NonFiniteError as error:
        raise _damaged(name, f"are broken: {error.message}") from error
    return module


def _damaged(name: str, how: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"the weights of {name} {how}",
        field="base_model",
        hint="Download the model again, with its own config.json and unquantised.",
    )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws one for every load and save."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises NonFiniteError, which names the tensor, where a value is NaN or infinite.

    Logits do not always tell: attention kernels for CPUs take the queries of NaN of a short
    sequence for masked ones, and answer zeros.
    """
    parts = {name: local(tensor) for name, tensor in weights.items()}
    if torch.nn.utils.get_total_norm(parts.values()).isfinite():
        return
    for name, tensor in parts.items():  # the squares of finite values may overflow
        if not tensor.isfinite().all():
            raise errors.NonFiniteError(
                f"{name} has values that are not finite.",
                hint="Go back to an earlier checkpoint, and train with a smaller learning rate.",
            )


@torch.no_grad()
def set_weights(
    parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> None:
    """Copies `weights` into the parameters of the same names.

    Raises:
        CheckpointMismatchError: names or shapes differ; before anything changed.
    """
    for name in sorted(parameters.keys() | weights.keys()):
        if name not in weights:
            what = f"the checkpoint lacks {name}."
        elif name not in parameters:
            what = f"the checkpoint has the unknown {name}."
        elif (shape := parameters[name].shape) != weights[name].shape:
            what = f"{name} has shape {list(weights[name].shape)}, the model's is {list(shape)}."
        else:
            continue
        raise errors.CheckpointMismatchError(
            what, field="path", hint="Load it into its own base model."
        )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def folder_of(source: str) -> Path:
    """Where a model's files are: a folder, or the cache of the hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(str(cached_file(source, CONFIG, local_files_only=True))).parent


def files_bytes(source: str) -> int | None:
    """Of all weights of a folder or cached id; None where they are not whole, or not here."""
    try:
        folder = folder_of(source)
        return sum((folder / file).stat().st_size for file in set(weight_map(folder).values()))
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def tied_weights(facts: ModelFacts) -> Mapping[str, str]:
    """Names of weights that the files need not have, and of those that they are tied to."""
    tied = AutoModelForCausalLM._model_mapping[type(facts.config)]._tied_weights_keys
    return tied or {} if facts.config.tie_word_embeddings else {}


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the names that the files have."""
    if (folder / INDEX).is_file():
        return dict(json.loads((folder / INDEX).read_text())["weight_map"])
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def weight_without_fractions(folder: Path) -> str | None:
    """The first weight that is stored as integers or bytes, as quantised ones are."""
    for shard in sorted(set(weight_map(folder).values())):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():
                if name.endswith(".weight") and file.get_slice(name).get_dtype() not in FLOATS:
                    return str(name)
    return None


def stored_tensor(facts: ModelFacts, name: str) -> torch.Tensor | None:
    """One tensor by the name that the model gives it; None where the files cannot tell."""
    try:
        folder = folder_of(facts.source)
        shards = weight_map(folder)
        for key in (name, tied_weights(facts).get(name, name)):
            if key in shards:
                with safe_open(folder / shards[key], framework="pt") as file:
                    tensor: torch.Tensor = file.get_tensor(key)
                    return tensor
    except (OSError, SafetensorError, ValueError, KeyError):
        pass  # the loading of the base says what is wrong with them
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointCorruptError where it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise corrupt(path, f"cannot be read ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise corrupt(path, "is not a JSON object")
    return value


def read_tensors(
    path: Path, *, cut: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Copies of a safetensors file's tensors; CheckpointCorruptError if it is broken or not finite.

    Of each, what `cut` leaves of it by its name.
    Copies, because `load_file` gives views of the file, and somebody may write over it.
    """
    try:
        tensors = {
            name: (tensor if cut is None else cut(name, tensor)).clone()
            for name, tensor in load_file(path).items()
        }
    except (OSError, SafetensorError) as error:
        raise corrupt(path, f"cannot be read ({type(error).__name__})") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise corrupt(path, f"has values in {name} that are not finite")
    return tensors


def corrupt(path: Path, what: str) -> errors.CheckpointCorruptError:
    """The error for a damaged file of a checkpoint."""
    return errors.CheckpointCorruptError(
        f"{path.name} in {path.parent.name} {what}.", field="path", hint="Use another checkpoint."
    )
