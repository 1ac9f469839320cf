"""`FakeEngine`: an engine of plain arithmetic, without torch, for tests and benchmarks.

It learns, saves, loads and samples for real, in microseconds. A test may hand it a hook that is
told of every call and may wait or raise.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from tests.fake_engine.model import VOCAB, read_weights, tokenizer_files
from tests.fake_engine.sampler import FakeSampler
from tests.fake_engine.trainer import FakeTrainer
from weaver.engine.base import ImportedWeights
from weaver.engine.threaded import ThreadedEngine
from weaver.errors import UnknownModelError, UnsupportedError, nearest
from weaver.types import LoraConfig, Message, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from weaver.types import SamplingParams, TrainingMode


class FakeEngine(ThreadedEngine):
    """An engine whose base models, `models`, are all alike.

    `hook(name, argument)` is called within each engine call, in its thread: it may sleep to make
    the call slow, or raise to make it fail. Names are those of the methods, with `load_sampler`
    for the sampler's `load`, `gradient` with each single `GradientJob`, where a `WeaverError`
    fails that job alone, and `write` in the thread that calls what `save` answered.
    """

    def __init__(
        self,
        *,
        models: Sequence[str] = ("fake",),
        context_length: int = 4096,
        slots: int = 4096,
        max_tokens_trained: int | None = None,
        hook: Callable[[str, object], None] = lambda name, argument: None,
    ) -> None:
        self.hook = hook
        self.description = "fake engine"
        self._models = {
            name: ModelInfo(
                name=name,
                architecture="FakeForCausalLM",
                vocab_size=VOCAB,
                context_length=context_length,
                num_parameters=2 * VOCAB,
            )
            for name in models
        }
        self._max_tokens_trained = max_tokens_trained
        self._calling = threading.Lock()
        self._samples = FakeSampler(self, slots=slots)
        super().__init__(FakeTrainer(self), self._samples)

    @property
    def counts(self) -> Mapping[str, int]:
        return self._samples.counts

    def list_models(self) -> Sequence[ModelInfo]:
        return list(self._models.values())

    def get_model(self, base_model: str) -> ModelInfo:
        if base_model not in self._models:
            raise UnknownModelError(
                f"no model is called {base_model!r}.",
                field="base_model",
                hint=nearest(base_model, self._models),
            )
        return self._models[base_model]

    def max_tokens_trained(self, base_model: str, training_mode: TrainingMode) -> int | None:
        self.get_model(base_model)
        return self._max_tokens_trained

    def encode(
        self,
        base_model: str,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        self.hook("encode", prompt)
        if not isinstance(prompt, str):
            prompt = [Message(role="tools", content=str(list(tools))), *prompt] if tools else prompt
            turns = "".join(f"{message.role}: {message.content}\n" for message in prompt)
            prompt = f"{turns}assistant: "
        return list(prompt.encode())

    def check_structure(self, base_model: str, params: SamplingParams) -> None:
        raise UnsupportedError("the fake engine knows no grammars.", field="json_schema")

    def tokenizer(self, base_model: str) -> None:
        """It has files alone."""

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        self.get_model(base_model)
        return tokenizer_files()

    def origin(self, base_model: str) -> str:
        return self.get_model(base_model).name

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        self.hook("merge_adapter", folder)
        weights, _ = read_weights(adapter, base_model)
        np.save(folder / "model.npy", weights)

    def import_weights(
        self, source: Path, folder: Path, *, base_model: str | None
    ) -> ImportedWeights:
        """Of an adapter whose `adapter_config.json` has the rank and the base; all are alike."""
        self.hook("import_weights", source)
        settings = json.loads((source / "adapter_config.json").read_text())
        name = self.get_model(base_model or settings["base_model_name_or_path"]).name
        (row,) = load_file(source / "adapter_model.safetensors").values()
        np.save(folder / "weight.npy", row)
        (folder / "state.json").write_text(json.dumps({"base_model": name, "step": 0}))
        return ImportedWeights(base_model=name, lora_config=LoraConfig(rank=settings["r"]))

    @contextmanager
    def call(self, name: str, argument: object) -> Iterator[None]:
        """Around each call of the engine: finds callers that break the rule of one at a time."""
        if not self._calling.acquire(blocking=False):
            raise RuntimeError(f"{name} was called during another call of this engine")
        try:
            self.hook(name, argument)
            yield
        finally:
            self._calling.release()
