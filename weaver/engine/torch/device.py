"""`Device`: where the engine computes and in which dtype; what is free there, what a model needs.

`TorchEngine` chooses one when it is made; `weaver doctor` asks before anything is loaded. Weights
get there from the files that they are read from.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weaver.engine.torch.lora import roles
from weaver.engine.torch.quantised import weights_bytes
from weaver.errors import ConfigError
from weaver.machine import free_memory_bytes
from weaver.types import LoraConfig, Quantize

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weaver.engine.torch.catalog import ModelFacts

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAM_COPIES = 4
"""What each trained value takes, in float32: itself, its gradient and two moments."""
CACHED_TOKENS = 4096
USABLE = 0.9
"""The rest is for activations of small batches and for everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """As it was chosen."""

    place: torch.device
    why: str
    """In a few words: `auto: torch finds no CUDA device`."""
    dtype: str
    """The dtype of frozen base weights, a key of `DTYPES`."""
    dtype_why: str


def choose_device(device: str, dtype: str) -> Device:
    """What these settings mean on this machine; `auto` is CUDA in bfloat16, else CPU in float32.

    Raises:
        ConfigError: one of them is unknown or cannot be used here; says what to do.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"is {dtype!r}.", field="dtype", hint="Use auto, float32 or bfloat16.")
    place, why = _find() if device == "auto" else _named(device)
    if place.type == "cuda":
        try:
            free_bytes(place)  # the first call that the driver may refuse
        except RuntimeError as error:
            raise ConfigError(
                f"is {device!r}, but {place} cannot be used: {str(error).splitlines()[0]}",
                field="device",
                hint="See what `nvidia-smi` says of it, or use WEAVER_DEVICE=cpu.",
            ) from error
    if dtype != "auto":
        return Device(place=place, why=why, dtype=dtype, dtype_why="as set")
    if place.type == "cuda":
        return Device(place=place, why=why, dtype="bfloat16", dtype_why="auto: on CUDA")
    return Device(place=place, why=why, dtype="float32", dtype_why="auto: on all but CUDA")


def _find() -> tuple[torch.device, str]:
    """The device of `auto`, and why that."""
    if lack := _lack_of_cuda():
        return torch.device("cpu"), f"auto: {lack[0]}"
    return torch.device("cuda", 0), "auto: the first CUDA device that torch finds"


def _named(name: str) -> tuple[torch.device, str]:
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d*))?", name):
        hint = "Use auto, cpu, cuda, cuda:N for the device of number N, or mps."
        raise ConfigError(f"is {name!r}.", field="device", hint=hint)
    if kind == "mps":
        if not torch.backends.mps.is_available():
            hint = "It needs macOS on Apple silicon; use auto or cpu."
            raise ConfigError("is 'mps', which torch does not find.", field="device", hint=hint)
        return torch.device(name), "as set; untested"
    if kind == "cuda":
        if lack := _lack_of_cuda():
            hint = f"{lack[1]}; or use auto or cpu."
            raise ConfigError(f"is {name!r}, but {lack[0]}.", field="device", hint=hint)
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            there = ", ".join(f"cuda:{i}" for i in range(count))
            hint = f"There is {there}; CUDA_VISIBLE_DEVICES may hide others."
            raise ConfigError(f"is {name!r}, which is not there.", field="device", hint=hint)
        return torch.device("cuda", int(index or 0)), "as set"
    return torch.device(name), "as set"


def _lack_of_cuda() -> tuple[str, str] | None:
    """Why torch has no CUDA device, and what to do about it; None where it has one."""
    if torch.cuda.is_available() and torch.cuda.device_count():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "this torch is built without CUDA",
            "Install one that has it, see https://pytorch.org/get-started/locally",
        )
    return (
        "torch finds no CUDA device",
        "See whether `nvidia-smi` lists one and CUDA_VISIBLE_DEVICES does not hide it",
    )


def free_bytes(place: torch.device) -> int | None:
    """What the device has, or this machine (or its container) for the CPU; None where not told.

    What torch holds and does not use is free.
    """
    if place.type == "cuda":
        held = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return torch.cuda.mem_get_info(place)[0] + held
    if place.type != "cpu":
        return None
    return free_memory_bytes()


def device_gauges(place: torch.device) -> dict[str, float]:
    """Memory of an accelerator, in bytes: all, and what is free of it; none of a CPU."""
    free = free_bytes(place) if place.type == "cuda" else None
    if free is None:
        return {}
    return {"device_bytes": torch.cuda.mem_get_info(place)[1], "device_free_bytes": free}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """In bytes."""

    dtype: str
    """Of `cache`, and of the weights that are not quantised."""
    quantize: Quantize
    weights: int
    adapter: int
    """A LoRA adapter of the default rank in training."""
    cache: int
    """Keys and values of one sequence of `cached_tokens`."""
    cached_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.cache

    def against(self, free: int | None) -> tuple[bool, str]:
        """Whether it fits, as far as is known, and the sum in words."""
        parts = (
            f"{size_text(self.weights)} weights, {size_text(self.adapter)} adapter and optimizer, "
            f"{size_text(self.cache)} cache of {self.cached_tokens:,} tokens"
        )
        total = size_text(self.total)
        if free is None:
            return True, f"needs {total} ({parts}); what is free is not known here"
        fits = self.total <= USABLE * free
        smaller = "WEAVER_DTYPE=bfloat16 or " if self.dtype == "float32" else ""
        if self.quantize == "none":
            smaller += "WEAVER_QUANTIZE=nf4 or "
        verdict = "fits" if fits else f"DOES NOT FIT; try {smaller}a smaller model"
        return fits, f"needs {total} of {size_text(free)} free ({parts}): {verdict}"


def needs_of(facts: ModelFacts, *, dtype: str, quantize: Quantize = "none") -> Needs:
    """Without activations, which grow with the tokens of a pass."""
    tokens = min(CACHED_TOKENS, facts.info.context_length)
    values = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * tokens
    size = DTYPES[dtype].itemsize
    return Needs(
        dtype=dtype,
        quantize=quantize,
        weights=weights_bytes(facts, dtype=DTYPES[dtype], quantize=quantize),
        adapter=adapter_bytes(facts),
        cache=values * size,
        cached_tokens=tokens,
    )


def adapter_bytes(facts: ModelFacts) -> int:
    """A LoRA adapter of the default rank in training."""
    lora = LoraConfig()
    chosen = roles(lora)
    sides = (t.in_features + t.out_features for t in facts.targets.values() if chosen[t.role])
    return ADAM_COPIES * torch.float32.itemsize * lora.rank * sum(sides)


def full_training_bytes(facts: ModelFacts, *, ranks: int = 1) -> int:
    """Weights, a gradient and two moments of full fine-tuning, in float32; of one of the ranks."""
    whole = ADAM_COPIES * torch.float32.itemsize * facts.info.num_parameters
    return part_bytes(facts, whole, ranks=ranks, trainable=True)


def part_bytes(facts: ModelFacts, whole: int, *, ranks: int, trainable: bool = False) -> int:
    """Of `whole` bytes of a model, what a rank has of it at most where layers are divided.

    Two layers are gathered at a time; what is not of the layers is divided if it is trained, but
    there in full, with its gradient, for the length of a pass.
    """
    if ranks == 1:
        return whole
    each = whole / facts.info.num_parameters
    tied = facts.config.tie_word_embeddings
    ends = (1 if tied else 2) * facts.info.vocab_size * facts.config.hidden_size
    layers = max(0, facts.info.num_parameters - ends)
    gathered = 2 * layers / facts.num_layers
    if trainable:
        gradients = 2 * torch.float32.itemsize * (gathered + ends)
        return int(whole / ranks + gradients)
    return int(each * (ends + layers / ranks + gathered))


def threads_text(threads: int) -> str:
    """The setting in words."""
    number = threads or f"1 to {physical_cores()}"
    return f"{number} thread{'' if number == 1 else 's'}"


def physical_cores() -> int:
    """Cores that this process may use, counting the two threads of one core once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    siblings: set[str] = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings) or os.cpu_count() or 1


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def take_from_files(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
    """Copies to the device, or here, what are views of a file, which may be overwritten.

    On Linux each gives its pages back once it is copied: they would count as memory of the process
    for as long as the last view of the file is there, so that a model were in memory twice.
    """
    mapped = _mapped_files()
    for parameter in parameters:
        view = parameter.data
        first, behind = view.data_ptr(), view.data_ptr() + view.nbytes
        of_file = any(start < behind and first < stop for start, stop in mapped)
        if of_file or not mapped or device != CPU:
            parameter.data = view.to(device, copy=True)
        start, stop = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, behind & -mmap.PAGESIZE
        if of_file and view.is_contiguous() and start < stop:
            address, size = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
            ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED)


def give_back_freed() -> None:
    """Gives the system what lies free between tensors, which glibc keeps for later ones.

    Tensors that are replaced by longer ones leave gaps that these do not fit into.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _mapped_files() -> list[tuple[int, int]]:
    """First address, and the one behind the last; nothing where the system does not tell."""
    if sys.platform != "linux":
        return []
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0].split("-") for fields in lines if fields[4] != "0"]
    return [(int(start, 16), int(stop, 16)) for start, stop in spans]
