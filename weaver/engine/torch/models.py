"""`LoadedModel`: a base model in memory, the one object that trainer and sampler compute with.

Also how its weights are read from their files, as a whole by `read_module` or single tensors, which
merging and the reading of adapters need. T rows of a packed batch, N rows of hidden states, H
hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file, logging

from weaver.engine.torch.catalog import only_here, refusing
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.linear import FrozenLinear, Routing
from weaver.engine.torch.packing import ATTENTION
from weaver.errors import CheckpointMismatchError, NonFiniteError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.lora import Adapter
    from weaver.engine.torch.packing import PackedBatch

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """From hidden states to logits, with what some architectures do behind the last projection."""

    linear: FrozenLinear | torch.nn.Linear
    path: str
    """Of the projection in the model: `lm_head`."""
    scale: float
    """Granite divides its logits by `logits_scaling`, Cohere multiplies by `logit_scale`."""
    softcap: float | None
    """c of c·tanh(z / c): Gemma's `final_logit_softcapping`."""

    @classmethod
    def of(cls, linear: FrozenLinear | torch.nn.Linear, path: str, config: Any) -> Head:
        """The head of a model with this transformers configuration."""
        factor = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(linear, path, factor / divisor, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> float32 [N, V], differentiable, with the adapters of the current routing."""
        return self.finish(self.linear(hidden).float())

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """Scale and soft cap."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def finish_back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turns d/d logits into d/d z, in place, where `logits = finish(z)`."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class LoadedModel:
    """A model on one device: frozen and shared with adapters, or trainable and owned by one run.

    Calls are serialized by the service. A trainable model has plain linear layers and no adapters.
    """

    def __init__(self, facts: ModelFacts, module: Any, *, trainable: bool) -> None:
        self.facts = facts
        self.info = facts.info
        self.module = module
        self.device: torch.device = module.device
        self.dtype: torch.dtype = module.dtype
        self.trainable = trainable
        self.routing = Routing()
        self.cache_shape = CacheShape(
            num_layers=facts.num_layers,
            num_kv_heads=facts.num_kv_heads,
            head_dim=facts.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        module.requires_grad_(trainable).eval()
        linear = module.get_output_embeddings()
        path = next(name for name, m in module.named_modules() if m is linear)
        if not trainable:
            self._freeze()
        self.head = Head.of(module.get_submodule(path), path, facts.config)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: of the generation settings, else of the configuration."""
        for config in (self.module.generation_config, self.facts.config):
            eos = getattr(config, "eos_token_id", None)
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
        return frozenset()

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """[T, H] after the final norm; differentiable in the adapters or the model's parameters."""
        with self.routing.of(batch.lengths, batch.adapters):
            output = self.module.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                packed_batch=batch,
            )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor, adapters: Sequence[Adapter | None]) -> torch.Tensor:
        """float32 [N, V] of hidden states [N, H]; `adapters` has one entry a row."""
        with self.routing.of([1] * len(adapters), adapters):
            return self.head.logits(hidden)

    def _freeze(self) -> None:
        for path, layer in list(self.module.named_modules()):
            if type(layer) is torch.nn.Linear:
                parent, _, name = path.rpartition(".")
                frozen = FrozenLinear(layer, path=path, routing=self.routing)
                setattr(self.module.get_submodule(parent), name, frozen)


def read_module(source: str | Path, *, name: str, config: Any | None, dtype: torch.dtype) -> Any:
    """transformers' model of a folder or cached id, complete and from safetensors.

    Raises:
        UnsupportedError: its weights cannot be read; speaks of it as `name`.
    """
    reading = refusing(
        f"the weights of {name} cannot be read",
        hint="Weights must be complete safetensors files that fit the config.json beside them.",
    )
    with reading, without_progress_bars():
        module, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
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
            name,
            f"do not fit config.json: {parameter} is {list(stored)}, not {list(wanted)}.",
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise _damaged(name, f"lack {missing[0]} ({len(missing)} in all).")
    for unknown in sorted(report["unexpected_keys"]):  # a bias, or a scale of quantised weights
        if _has_parameters(module, unknown.rpartition(".")[0]):
            raise _damaged(name, f"have {unknown}, which config.json does not.")
    for parameter in module.parameters():  # else a view of the file, which may be overwritten
        parameter.data = parameter.data.clone()
    try:
        check_finite(dict(module.named_parameters()))
    except NonFiniteError as error:
        raise _damaged(name, f"are broken: {error.message}") from error
    return module


def _has_parameters(module: torch.nn.Module, path: str) -> bool:
    layer = dict(module.named_modules()).get(path)
    return layer is not None and any(True for _ in layer.parameters(recurse=False))


def _damaged(name: str, how: str) -> UnsupportedError:
    return UnsupportedError(
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


def check_weights(
    parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> None:
    """Raises CheckpointMismatchError where names or shapes differ."""
    for name in sorted(parameters.keys() | weights.keys()):
        if name not in weights:
            what = f"the checkpoint lacks {name}."
        elif name not in parameters:
            what = f"the checkpoint has the unknown {name}."
        elif (shape := parameters[name].shape) != weights[name].shape:
            what = f"{name} has shape {list(weights[name].shape)}, the model's is {list(shape)}."
        else:
            continue
        raise CheckpointMismatchError(what, field="path", hint="Load it into its own base model.")


@torch.no_grad()
def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises NonFiniteError, which names the tensor, where a value is NaN or infinite.

    Logits do not always tell: attention kernels for CPUs take the queries of NaN of a short
    sequence for masked ones, and answer zeros.
    """
    if torch.nn.utils.get_total_norm(weights.values()).isfinite():
        return
    for name, tensor in weights.items():  # the squares of finite values may overflow
        if not tensor.isfinite().all():
            raise NonFiniteError(
                f"{name} has values that are not finite.",
                hint="Go back to an earlier checkpoint, and train with a smaller learning rate.",
            )


@torch.no_grad()
def set_weights(
    parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> None:
    """Copies `weights`, which were checked, into the parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def folder_of(source: str) -> Path:
    """Where a model's files are: a folder, or the cache of the hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(str(cached_file(source, CONFIG, local_files_only=True))).parent


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
