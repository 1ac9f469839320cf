"""`save_parts`: a checkpoint of full fine-tuning over a divided model.

Each rank writes its part, by torch's distributed checkpoints. Whoever writes the checkpoint joins
them into what one process would have written: any number of ranks loads it, and so does any program
that reads transformers' files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch

from weaver.engine.torch.checkpoints import ADAM_STEP, MOMENTS, Copy, State
from weaver.engine.torch.files import check_finite
from weaver.errors import StorageError

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.training_run import Run

WEIGHT = "weight"
"""The kind of tensor beside Adam's moments."""


def save_parts(run: Run, optimizer: torch.optim.Optimizer | None) -> Callable[[Path], None]:
    """Writes the parts of all ranks, and answers what makes a checkpoint of them, in one rank.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        StorageError: the disk is full or not writable.
    """
    own, parts, parameters = run.own, run.parts, run.named_parameters()
    assert own is not None and parts is not None
    shards = parts.shards
    shards.agreed(partial(check_finite, parameters))
    states = [{} if optimizer is None else optimizer.state[p] for p in parameters.values()]
    kinds = [{WEIGHT, *({*MOMENTS} & each.keys())} for each in states]
    stored = {
        f"{name}.{kind}": parts.divided(name, part if kind == WEIGHT else state[kind])
        for (name, part), state, some in zip(parameters.items(), states, kinds, strict=True)
        for kind in sorted(some)
    }
    folder = shards.new_folder()
    _write(stored, folder)
    step = states[0].get(ADAM_STEP, torch.zeros((), dtype=torch.float32))
    saved = _Saved(
        folder=folder,
        shapes={key: tensor.shape for key, tensor in stored.items()},
        state=run.state(),
        facts=run.facts,
        module=own.module,
        layout=parts.layout(own.module),
        step=None if optimizer is None else step.detach().cpu().clone(),
    )
    if shards.rank == 0:
        finalize(saved, rmtree, folder, ignore_errors=True)
    return saved.write


@dataclass(frozen=True, kw_only=True, eq=False)
class _Saved:
    """The parts of a run as it was; their folder goes with it."""

    folder: Path
    shapes: dict[str, torch.Size]
    """Of whole tensors, by the parameter and, behind a dot, the kind."""
    state: State
    facts: ModelFacts
    module: Any
    layout: dict[str, str]
    """Names in files, and of the parameters."""
    step: torch.Tensor | None
    """The optimizer's; None without one."""

    def write(self, folder: Path) -> None:
        """Makes a checkpoint of an empty folder. Errors: see `Copy.write`."""
        whole = self._joined()
        moments = {k: t for k, t in whole.items() if k.rpartition(".")[2] in MOMENTS}
        copy = Copy(
            state=self.state,
            facts=self.facts,
            module=self.module,
            weights={key: whole[f"{name}.{WEIGHT}"] for key, name in self.layout.items()},
            optimizer=None if self.step is None else {ADAM_STEP: self.step, **moments},
        )
        copy.write(folder)

    def _joined(self) -> dict[str, torch.Tensor]:
        """Whole tensors, float32, which lie in files of their own: there may be many bytes."""
        checkpoint: Any = import_module("torch.distributed.checkpoint")
        whole = {
            key: torch.from_file(
                str(self.folder / f"{i}.whole"), shared=True, size=shape.numel()
            ).view(shape)
            for i, (key, shape) in enumerate(self.shapes.items())
        }
        reader = checkpoint.HuggingFaceStorageReader(str(self.folder))
        with warnings.catch_warnings(action="ignore"):  # that it is for a single process
            checkpoint.load(dict(whole), storage_reader=reader, no_dist=True)
        return whole


def _write(stored: dict[str, Any], folder: Path) -> None:
    """Each rank its part; all of them at once."""
    checkpoint: Any = import_module("torch.distributed.checkpoint")
    try:
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save(stored, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise StorageError(
            f"the parts of the ranks cannot be written to {folder}: {reason}",
            hint="Free some space or check the permissions.",
        ) from error
