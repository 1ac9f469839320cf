"""`ModelRoom`: which base models have room in memory, and what waits for some.

`ModelStore` asks before it loads, in the engine's thread; plans ask for sizes, in any. Who has base
models in use between two calls says so through `users`, who waits for some through `waiters`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from weakref import WeakKeyDictionary, ref

import torch

from weaver.engine.torch.catalog import Catalog, ModelFacts
from weaver.engine.torch.device import USABLE, give_back_freed, part_bytes, size_text
from weaver.engine.torch.files import files_bytes
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.quantised import weights_bytes
from weaver.engine.torch.read_ahead import ReadAhead
from weaver.engine.torch.residents import TURNS, Residents
from weaver.errors import ConfigError, QuotaExceededError, UnsupportedError, WeaverError
from weaver.types import Quantize

logger = logging.getLogger(__name__)
MODEL_SHARE = 0.5
"""Of the memory that can be used, for base models where there are several; the rest is for what is
computed with them. One that is alone may take more."""
WAIT_S = 300.0
"""How long something waits for its base model while others hold the memory."""
AHEAD_BYTES = 2**28
"""Files of so many bytes are read ahead where other models are computed with meanwhile."""


class ModelRoom:
    """`memory` is that of `ModelStore`; `model_memory` the bytes that base models may take of it.

    0 is as `MODEL_SHARE` has it.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Quantize,
        memory: int | None,
        model_memory: int,
        ranks: int = 1,
    ) -> None:
        self._catalog = catalog
        self.shared = catalog.shared
        self._device = device
        self._dtype = dtype
        self._quantize = quantize
        self._memory = memory
        self._ranks = ranks
        """Among which the layers are divided."""
        shared = None if memory is None else int(MODEL_SHARE * USABLE * memory)
        self.residents = Residents(
            budget=model_memory or shared, strict=bool(model_memory), memory=memory
        )
        self.users: list[Callable[[], set[str]]] = []
        """Each answers the base models that it has in use between two calls."""
        self.waiters: list[Callable[[], Iterable[tuple[str, float]]]] = []
        """Each answers the base models that it waits for, and since when."""
        self.leave: list[Callable[[LoadedModel], None]] = []
        """Told of a base model that is unloaded, to let go of what belongs to it."""
        self.adapters: dict[str, int] = {}
        """Bytes of each run's adapter in training."""
        self.reading = ReadAhead()
        self.loads = 0
        self.unloads = 0
        """Of base models, so far."""
        self._reckoned: dict[tuple[str, bool], int] = {}
        """What `beside` answers."""
        self._opened: set[str] = set()
        """Base models that were loaded at some time."""
        self.owned: WeakKeyDictionary[LoadedModel, int] = WeakKeyDictionary()
        """Models that are not shared, and their bytes with what trains them."""
        self._files: dict[str, int] = {}
        """Bytes of their weights in files."""
        self._said: set[str] = set()
        """Of whose waiting the log has told."""

    def size(self, facts: ModelFacts) -> int:
        """Bytes of a base model; on a CPU each matrix has a second layout for the way back."""
        copies = 2 if self._device.type == "cpu" and self._ranks == 1 else 1
        return self._bytes(facts, copies=copies)

    def _bytes(self, facts: ModelFacts, *, copies: int = 1) -> int:
        whole = weights_bytes(facts, dtype=self._dtype, quantize=self._quantize, copies=copies)
        return part_bytes(facts, whole, ranks=self._ranks)

    def beside(self, facts: ModelFacts, *, base: bool = True) -> int:
        """Bytes that other base models may take beside this one, or all beside a run's own.

        Those that the engine was given are reckoned with from the beginning, others once they were
        loaded, so that plans change only with the models that there are.
        """
        key = facts.info.name, base
        if key not in self._reckoned:
            names = self._opened.copy()
            if base and not self._catalog.allows_paths:
                names.update(map(self.shared, self._catalog.given))
            own = self.size(facts) if base else 0
            others = names - {self.shared(facts.info.name) if base else ""}
            known = map(self._known, others)
            total = own + sum(self.size(one) for one in known if one is not None)
            budget = self.residents.budget
            most = total if budget is None else min(total, budget)
            self._reckoned[key] = max(0, most - own)
        return self._reckoned[key]

    def adapter_room(self) -> int:
        """Bytes of all adapters in training, in steps, so that plans seldom change with them."""
        step = max(1, (self._memory or 0) // 64)
        return -(-sum(list(self.adapters.values())) // step) * step

    def prepare(self, facts: ModelFacts) -> None:
        """Before a base model is loaded: makes room for it.

        Raises:
            UnsupportedError: there is none even if it is alone.
            QuotaExceededError: see `make`.
        """
        self.reading.forget(facts.info.name)
        self._said.discard(facts.info.name)
        self.check_alone(facts)
        self.make(self.size(facts), facts)

    def put(self, facts: ModelFacts, model: LoadedModel, *, load_s: float) -> None:
        """It is loaded, which took so long."""
        name, size = facts.info.name, self.size(facts)
        self.residents.put(name, model, nbytes=size, load_s=load_s)
        if name not in self._opened:
            self._opened.add(name)
            self._reckoned.clear()
        self.loads += 1
        logger.info("%s is loaded: %s in %.1f s", name, size_text(size), load_s)

    def delay_s(self, name: str, *, since: float) -> float:
        """How long what needs a base model since then has to wait for it.

        0: it is there, can be loaded, or `base` says why it cannot be. It may be less: once its
        files are read, of which `reading.wake` tells, or others are not in use any more.
        """
        name = self._catalog.shared(name)
        facts = None if name in self.residents.names else self._known(name)
        if facts is None or time.monotonic() - since >= WAIT_S:
            return 0.0
        owned = self.owned_bytes
        if not self.residents.could_hold(self.size(facts), owned=owned):
            return 0.0
        if self.residents.names and self._is_large(facts) and self.reading.goes_on(facts):
            return self._waits(name, "its files are being read", since)
        leaving = self._leaving(facts)
        if leaving is None:
            return self._waits(name, f"no memory beside {_list(self._in_use())}", since)
        return self.residents.delay_s(leaving, since=since)

    def holds_back(self, name: str) -> bool:
        """Whether new samples of a model wait, so that it can make room for one that waits."""
        one, now = self.residents.get(name), time.monotonic()
        if one is None:
            return False
        return any(
            now - since > TURNS * one.load_s
            and other not in self.residents.names
            and (facts := self._known(other)) is not None
            and self._leaving(facts) is None
            for waiting in self.waiters
            for other, since in waiting()
        )

    def _known(self, name: str) -> ModelFacts | None:
        with suppress(WeaverError):
            return self._catalog.facts(name)
        return None

    def _is_large(self, facts: ModelFacts) -> bool:
        """Whether its files are long, or not all here."""
        name = facts.info.name
        if name not in self._files:
            size = files_bytes(facts.source)
            if size is None:
                return True
            self._files[name] = size
        return self._files[name] >= AHEAD_BYTES

    def _leaving(self, facts: ModelFacts) -> list[str] | None:
        size, owned = self.size(facts), self.owned_bytes
        return self.residents.leaving(size, owned=owned, in_use=self._in_use())

    def _in_use(self) -> set[str]:
        return set[str]().union(*(names() for names in self.users))

    def _waits(self, name: str, why: str, since: float) -> float:
        if name not in self._said:
            self._said.add(name)
            logger.info("%s waits: %s", name, why)
        return max(0.0, since + WAIT_S - time.monotonic())

    def check_alone(self, facts: ModelFacts) -> None:
        """Raises UnsupportedError where a base model has no room even if it is alone."""
        name, size = facts.info.name, self.size(facts)
        least = self._bytes(facts)
        budget, memory = self.residents.budget, self._memory
        if self.residents.strict and budget is not None and size > budget:
            raise UnsupportedError(
                f"{name} takes {size_text(size)}, base models may take {size_text(budget)}.",
                field="base_model",
                hint="Raise WEAVER_MODEL_MEMORY_GB (--model-memory-gb), or use a smaller model.",
            )
        if memory is not None and least > memory:
            raise UnsupportedError(
                f"the weights of {name} take {size_text(least)}, {self._device} had "
                f"{size_text(memory)} free when the engine began.",
                field="base_model",
                hint="Use WEAVER_DTYPE=bfloat16, WEAVER_QUANTIZE=nf4 or a smaller model.",
            )

    def check_together(self, names: Sequence[str]) -> None:
        """Raises ConfigError where these are not in memory at the same time."""
        found = {self._catalog.shared(name): self.size(self._catalog.facts(name)) for name in names}
        budget, total = self.residents.budget, sum(found.values())
        if budget is not None and total > budget and len(found) > 1:
            raise ConfigError(
                f"{', '.join(found)} are to be loaded at the start and take {size_text(total)}, "
                f"base models may take {size_text(budget)}.",
                field="model",
                hint="Raise WEAVER_MODEL_MEMORY_GB (--model-memory-gb), or leave out load=start.",
            )

    def make(self, size: int, facts: ModelFacts, *, base: bool = True) -> None:
        """Unloads those used least lately until so many bytes are free.

        Raises:
            QuotaExceededError: they are in use, or what cannot be unloaded takes the room.
        """
        in_use, owned = self._in_use(), self.owned_bytes
        leaving = self.residents.leaving(size, owned=owned, in_use=in_use, base=base)
        if leaving is None:
            held = [f"samples of {name}" for name in sorted(in_use)]
            if owned:
                held.append(f"models of full fine-tuning ({size_text(owned)})")
            raise QuotaExceededError(
                f"there is no memory for {size_text(size)} of {facts.info.name} beside "
                f"{' and '.join(held) or 'what is loaded'}.",
                field="base_model",
                hint="Try again later, or give base models more: WEAVER_MODEL_MEMORY_GB.",
            )
        for name in leaving:
            self._unload(name)

    def _unload(self, name: str) -> None:
        model = self.residents.take(name)
        for leave in self.leave:
            leave(model)
        left = ref(model)
        del model
        if left() is not None:  # something has it in a circle, and its room is taken next
            gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_freed()
        self.unloads += 1
        logger.info("%s is unloaded; its runs stay as they are", name)

    @property
    def freeable_bytes(self) -> int:
        """What is free at least, once no base model is there any more."""
        known = (self._known(name) for name in self.residents.names)
        return sum(self._bytes(facts) for facts in known if facts is not None)

    @property
    def owned_bytes(self) -> int:
        """Of models that are not shared: those in full fine-tuning, and their snapshots."""
        return sum(list(self.owned.values()))


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "what is loaded"
