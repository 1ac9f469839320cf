"""`Shards`: the processes that keep the layers of a model together, a part each, by FSDP2.

The ranks of a group in `fsdp` mode have one; `ModelStore` reads models with it, and `LoadedModel`
runs them. PyTorch FSDP: https://arxiv.org/abs/2304.11277. Whatever computes a pass does so inside
of `run`, and every process makes the same passes in the same order: each gathers every layer from
all of them, there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch

from weaver.engine.torch.device import give_back_freed, take_from_files
from weaver.engine.torch.recompute import decoder_layers
from weaver.errors import (
    CheckpointMismatchError,
    ConfigError,
    StorageError,
    UnsupportedError,
    WeaverError,
)

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts

R = TypeVar("R")
UNEVEN = 0.05
"""Of the bytes of all layers, what a process may hold beyond its share: 0.55 for one of two."""


class Shards:
    """
    Args:
        mesh: torch's `DeviceMesh` of one dimension, over all these processes.
        gather: what each of them gives, by rank; called by all of them.
        folder: one that all of them see, for what is saved in parts.
    """

    def __init__(self, mesh: Any, *, gather: Callable[[Any], list[Any]], folder: Path) -> None:
        """Raises ConfigError: this torch is too old."""
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                f"is fsdp, for which torch {torch.__version__} is too old.",
                field="mode",
                hint="Install torch 2.13 or later, or use mode = replicated.",
            )
        self.mesh = mesh
        self.size: int = mesh.size()
        self.rank: int = mesh.get_local_rank()
        self.folder = folder
        self._gather = gather

    def agreed(self, work: Callable[[], R]) -> R:
        """What it answers, once it has succeeded in all processes; else its first error in all."""
        answer: R | None = None
        error = None
        try:
            answer = work()
        except WeaverError as raised:
            error = raised
        for each in self._gather(error):
            if each is not None:
                raise each
        return answer  # type: ignore[return-value]

    def new_folder(self) -> Path:
        """One for all of them; StorageError where it cannot be made."""
        folder: Path = self.folder / self._gather(uuid4().hex)[0]

        def make() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make {folder}: {error.strerror}") from error

        self.agreed(make)
        return folder

    def divide(
        self, module: Any, *, facts: ModelFacts, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Keeps this process' part of each layer of a model whose weights are views of its files.

        No more than one layer is here in full. Parameters of the stored dtype get `dtype`.

        Raises:
            UnsupportedError: the model has no list of layers.
        """
        from torch.distributed.fsdp import fully_shard

        stored, layers = module.dtype, decoder_layers(module.base_model, facts.num_layers)
        if not layers:
            raise UnsupportedError(
                f"{facts.info.name} has no list of layers that could be divided among ranks.",
                field="mode",
                hint="Use mode = replicated.",
            )
        for layer in layers:
            parameters = list(layer.parameters())
            take_from_files(parameters, device)
            for parameter in parameters:
                if parameter.dtype == stored:
                    parameter.data = parameter.data.to(dtype)
            del parameters, parameter
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=True)
            give_back_freed()

    def whole(self, module: Any, *, trainable: bool) -> Any:
        """What a pass is a call of. Of a trainable model it has what is not of the layers, too.

        Gradients are sums over all processes.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        root = _Root(module)
        others = {p for p in module.parameters() if not is_divided(p)}
        fully_shard(
            root,
            mesh=self.mesh,
            reshard_after_forward=False,
            ignored_params=None if trainable else others,
        )
        for part in root.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo has no other
                part.set_reduce_scatter_unused_params(True)  # the head's, where there are no datums
        return root


class _Root(torch.nn.Module):
    """A module whose call is whatever is to be computed with the model in it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Parts:
    """A divided model: how its passes are run, and the parts of what is trained."""

    def __init__(self, shards: Shards, module: Any, *, trainable: bool) -> None:
        self.shards = shards
        self._root = shards.whole(module, trainable=trainable)
        self._anchor = torch.zeros((), dtype=module.dtype, device=module.device)
        self._divided = dict(module.named_parameters()) if trainable else {}
        self._trained: dict[str, torch.Tensor] = {}

    def check(self, layers: Sequence[torch.nn.Module], facts: ModelFacts) -> None:
        """Raises UnsupportedError in all processes: see `check_divided`."""
        self.shards.agreed(partial(check_divided, layers, facts, ranks=self.shards.size))

    def hold(self, embedding: torch.nn.Module) -> None:
        """Lets the gradient of every pass of a frozen model go all the way back.

        Each layer is gathered on that way, which all processes have to do alike, whichever
        adapters their own datums have.
        """
        self._anchor.requires_grad_()
        anchor = self._anchor

        def add(_: torch.nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
            return out + anchor if torch.is_grad_enabled() else out

        embedding.register_forward_hook(add)

    def run(self, work: Callable[[], R]) -> R:
        """Calls `work`, in which the model may be used; all processes at once."""
        answer: R = self._root(work)
        if not torch.is_grad_enabled():  # else a backward pass does it
            self._root.reshard()
        return answer

    def tied(self, loss: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        """The loss, of which hidden states [T, H] are a part whatever it is made of.

        They add a gradient of exactly 0, even where they are not finite.
        """
        nothing = 0.0 * hidden.double().sum()
        return nothing if loss is None else loss + nothing

    def gradients(self, loss: torch.Tensor, adapters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of adapters, of which each process has the whole; of its own datums."""
        inputs = [*adapters, self._anchor]
        return list(torch.autograd.grad(loss, inputs, materialize_grads=True))[:-1]

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """This process' parts of the model's parameters by name; changing them changes it."""
        if not self._trained:  # the first pass may set them anew
            self._trained = {name: local(p.detach()) for name, p in self._divided.items()}
        return self._trained

    def take_gradients(self) -> list[torch.Tensor]:
        """The parts of what `backward` has summed, one for each of `trained`; it starts anew."""
        taken = []
        for name, parameter in self._divided.items():
            gradient, parameter.grad = parameter.grad, None
            part = self.trained[name]
            taken.append(torch.zeros_like(part) if gradient is None else local(gradient))
        return taken

    def _cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a parameter's tensor that are this process'; a view."""
        shape = self._divided[name].shape
        if tensor.shape != shape:
            raise CheckpointMismatchError(
                f"{name} has shape {list(tensor.shape)}, the model's is {list(shape)}.",
                field="path",
                hint="Load it into its own base model.",
            )
        each = -(-shape[0] // self.shards.size)
        return tensor[each * self.shards.rank : each * (self.shards.rank + 1)]

    def cut(self, module: torch.nn.Module) -> None:
        """Leaves of a whole model, whose weights are views of files, copies of such parts."""
        for name, parameter in module.named_parameters():
            if name in self._divided:
                parameter.data = self._cut(name, parameter.data).clone()

    def cut_moment(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The part of what an optimizer has, by the parameter's name and its own."""
        name = key.rpartition(".")[0]
        return self._cut(name, tensor) if name in self._divided else tensor

    def layout(self, module: Any) -> dict[str, str]:
        """The names of the model's tensors in files, tied ones too, and of what they are."""
        names = {id(parameter): name for name, parameter in self._divided.items()}
        return {key: names[id(tensor)] for key, tensor in module.state_dict(keep_vars=True).items()}

    def divided(self, name: str, part: torch.Tensor) -> Any:
        """torch's `DTensor` of what all processes have for a parameter of this name."""
        from torch.distributed.tensor import DTensor

        like: Any = self._divided[name]
        return DTensor.from_local(
            part,
            self.shards.mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def is_divided(tensor: torch.Tensor) -> bool:
    """Without an import of what only groups need."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> torch.Tensor:
    """This process' part of a tensor; all of one that is not divided."""
    part: torch.Tensor = tensor.to_local() if is_divided(tensor) else tensor
    return part


def check_divided(layers: Sequence[torch.nn.Module], facts: ModelFacts, *, ranks: int) -> None:
    """Raises UnsupportedError where a rank holds more of the layers than its share.

    FSDP2 divides the parameters of modules, and says nothing of weights that are none any more.
    """
    parameters = [p for layer in layers for p in layer.parameters()]
    targets = [t for t in facts.targets.values() if t.role != "unembed"]
    linear = sum(t.out_features * t.in_features for t in targets)
    divided = sum(p.numel() for p in parameters if is_divided(p))
    if divided < linear:
        what = f"divide {divided:,} of at least {linear:,} weights in the layers"
        held = 1.0
    else:
        held = sum(local(p).nbytes for p in parameters) / sum(
            p.numel() * p.element_size() for p in parameters
        )
        what = f"hold {held:.0%} of the layers' bytes each"
    if held > 1 / ranks + UNEVEN:
        raise UnsupportedError(
            f"{ranks} ranks would {what} of {facts.info.name}.",
            field="mode",
            hint="Use mode = replicated, or a number of ranks that the layers' rows divide by.",
        )
