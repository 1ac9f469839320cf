"""`Catalog`: which base models there are, and what their configuration says, without their weights.

`TorchEngine` asks it before anything is loaded. A name is one of the configured ones (`weaver-nano`
always is), a local folder, or a Hugging Face id; code in a model's folder is never run.
What transformers raises about a model
passes through `refusing`, here, where models are loaded and where they are checked.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from weaver import errors
from weaver.boundary import converting
from weaver.engine.sources import Load, ModelSource
from weaver.engine.torch.grammars import Grammars
from weaver.engine.torch.lora import Target, find_targets, has_fused_experts
from weaver.engine.torch.origins import origin_of
from weaver.threads import out_at_exit
from weaver.tokenizers import end_tokens
from weaver.types import Message, ModelInfo

NANO = Path(__file__).parents[2] / "models" / "nano"
HUB_ID = r"[\w.-]+/[\w.-]+"
HINT = "Choose a decoder-only model with plain causal attention, such as Llama or Qwen3."
HUB_TIMEOUT_S = 0.8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Without one of them transformers makes up an empty tokenizer."""
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where it has no class for it: the CPU, the CUDA driver, and cuBLAS."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a configuration tells about a model that can run here."""

    info: ModelInfo
    source: str
    """A folder, or a Hugging Face id."""
    config: Any
    """A transformers `PreTrainedConfig`."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softcap: float | None
    """Of attention scores, see `Heads`."""
    sinks: bool
    targets: Mapping[str, Target]
    fused_experts: bool
    projected: int
    """Values a token that all projections but the head take and give; of a mixture's experts,
    those of as many as a token goes to."""
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def origin(self) -> str:
        """Where others find it, as adapters and model cards say."""
        return origin_of(self.source)

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer, read once, whichever threads ask for it meanwhile.

        Raises:
            UnsupportedError: the model has none that can be read.
        """
        with self._reading:
            return self._tokenizer

    def read_ahead(self) -> None:
        """Begins to read the tokenizer in a thread of its own; a fault is told when it is used."""

        def read() -> None:
            with suppress(errors.UnsupportedError, ImportError):
                out_at_exit(lambda: self.tokenizer)

        if "_tokenizer" not in vars(self):
            threading.Thread(target=read, name="weaver-tokenizer", daemon=True).start()

    @cached_property
    def _tokenizer(self) -> Any:
        name, folder = self.info.name, Path(self.source)
        if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
            raise _no_tokenizer(name, f"{folder} has none of {', '.join(TOKENIZER_FILES)}")
        try:
            return AutoTokenizer.from_pretrained(
                self.source, trust_remote_code=False, local_files_only=only_here(self.source)
            )
        except (OSError, ValueError, KeyError) as error:
            raise _no_tokenizer(name, first_line(error)) from error

    @cached_property
    def longest_text(self) -> int:
        """The characters that can fit the context: what is longer has too many tokens anyhow."""
        return self.info.context_length * max(map(len, self.tokenizer.get_vocab()))

    def check_text(self, prompt: str | Sequence[Message]) -> None:
        """Raises ContextLengthError where encoding a text would take long, and for nothing."""
        texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        if (length := sum(map(len, texts))) > self.longest_text:
            raise errors.ContextLengthError(
                f"has {length} characters; the model's context of {self.info.context_length} "
                f"tokens holds at most {self.longest_text}.",
                field="prompt",
                hint="Shorten it.",
            )

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a reply, as the tokenizer and its chat template have them."""
        return frozenset(end_tokens(self.tokenizer).values())

    @cached_property
    def grammars(self) -> Grammars:
        """Errors: see there."""
        return Grammars(self.tokenizer, name=self.info.name, vocab_size=self.info.vocab_size)

    def tokenizer_files(self) -> dict[str, bytes]:
        """File names and contents, as `save_pretrained` writes them; chat templates in one file."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder, save_jinja_files=False)
            return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


class Catalog:
    """Facts by name, each read once.

    Args:
        models: folders and Hugging Face ids by name, or what else is known of them.
        allow_paths: any other folder or id may be named, too; else nothing but `models` is opened.
    """

    def __init__(
        self, models: Mapping[str, str | Path | ModelSource], *, allow_paths: bool
    ) -> None:
        given = {"weaver-nano": NANO, **models}
        self._sources = {name: ModelSource.of(source) for name, source in given.items()}
        self.given = list(models)
        self.allows_paths = allow_paths
        self._facts: dict[str, ModelFacts] = {}

    def names(self, *, load: Load | None = None) -> list[str]:
        """The configured models that are there, or those that are loaded at such a time."""
        return [
            name
            for name, source in self._sources.items()
            if not isinstance(source.place, Path) or source.place.is_dir()
            if load in (None, source.load)
        ]

    def shared(self, name: str) -> str:
        """The first name of the same model: each is in memory once, whatever it is called."""
        source = self._sources.get(name)
        return next((n for n, s in self._sources.items() if s == source), name)

    def facts(self, name: str) -> ModelFacts:
        """Reads the configuration; under a second.

        Raises:
            UnknownModelError: no such name, folder or cached id; with the known names.
            UnsupportedError: the architecture cannot run here, and why.
        """
        if name not in self._facts:
            source, context = self._source(name), None
            if name in self._sources:
                context = self._sources[name].context
            with refusing(f"{name} cannot run here", hint=HINT):
                config = self._config(name, source)
                facts = _read_facts(name, source, config=config)
                self._facts[name] = facts if context is None else _cut(facts, context)
        return self._facts[name]

    def name_of(self, origin: str) -> str:
        """What a model is called here that is found there; `origin` itself where nothing is."""
        if origin in self._sources:
            return origin
        places = ((name, str(source.place)) for name, source in self._sources.items())
        return next((n for n, place in places if origin in (place, origin_of(place))), origin)

    def _source(self, name: str) -> str:
        if name in self._sources:
            source = self._sources[name].place
            if isinstance(source, Path) and not source.is_dir():
                raise self._unknown(name, f"{source} is not there.")
            return str(source)
        if self.allows_paths and Path(name).expanduser().is_dir():
            return str(Path(name).expanduser())
        if self.allows_paths and re.fullmatch(HUB_ID, name):
            return name
        raise self._unknown(name, "no such model.")

    def _config(self, name: str, source: str) -> Any:
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise self._unknown(name, "the folder has no config.json.")
        try:
            return AutoConfig.from_pretrained(
                source, trust_remote_code=False, local_files_only=only_here(source)
            )
        except OSError as error:
            reason = f"cannot be read or fetched: {first_line(error)}"
            raise self._unknown(name, reason) from error

    def _unknown(self, name: str, reason: str) -> errors.UnknownModelError:
        others = (
            "; or give a folder with config.json and safetensors, or a Hugging Face id."
            if self.allows_paths
            else ". `weaver serve --model` adds others."
        )
        hint = f"Known: {', '.join(self.names()) or 'none'}{others}"
        return errors.UnknownModelError(f"{name!r}: {reason}", field="base_model", hint=hint)


def _cut(facts: ModelFacts, context: int) -> ModelFacts:
    """With a context of so many tokens."""
    most = facts.info.context_length
    if context > most:
        raise errors.ConfigError(
            f"{facts.info.name} is to have a context of {context} tokens, it has {most}.",
            field="model",
            hint="Leave its context out, or give less.",
        )
    return replace(facts, info=facts.info.model_copy(update={"context_length": context}))


def _read_facts(name: str, source: str, *, config: Any) -> ModelFacts:
    """Builds the model without storage to see its layers."""
    _check_config(name, config)
    # Of float32, as transformers makes a model's dtype that of the process meanwhile, in which
    # others compute; it notes it in the configuration, too, of which this is a copy.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
    if not model._supports_attention_backend:
        raise _unsupported(name, "its attention cannot be replaced by packed attention.")
    head, heads = model.get_output_embeddings(), config.num_attention_heads
    if not isinstance(head, torch.nn.Linear):
        raise _unsupported(name, "its output embedding is not a linear layer.")
    targets = find_targets(model, head)
    if len({t.out_features for path, t in targets.items() if path.endswith(".k_proj")}) > 1:
        raise _unsupported(name, "its layers differ in their key heads.")
    info = ModelInfo(
        name=name,
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        context_length=_context_length(config),
        num_parameters=sum(p.numel() for p in model.parameters()),
    )
    return ModelFacts(
        info=info,
        source=source,
        config=config,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=1
        if getattr(config, "multi_query", False)
        else getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        softcap=getattr(config, "attn_logit_softcapping", None),
        sinks=any(path.endswith(".sinks") for path, _ in model.named_parameters()),
        targets=targets,
        fused_experts=has_fused_experts(model),
        projected=_projected(model, head, chosen=getattr(config, "num_experts_per_tok", None) or 1),
    )


def _projected(model: torch.nn.Module, head: torch.nn.Module, *, chosen: int) -> int:
    """See `ModelFacts`. Fused experts are tensors [experts, out, in]."""
    weights = [
        parameter
        for module in model.modules()
        if module is not head and not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim in (2, 3)
    ]
    return sum(sum(w.shape[-2:]) * (chosen if w.ndim == 3 else 1) for w in weights)


def _check_config(name: str, config: Any) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = dict(quantised).get("quant_method", "in an unknown way")
        raise _unsupported(name, f"its weights are quantised ({method}); use those it was made of.")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _unsupported(name, f"{config.model_type} is not a causal language model.")
    if config.get_text_config() is not config or config.is_encoder_decoder:
        raise _unsupported(name, f"{config.model_type} is more than a text decoder.")
    if getattr(config, "kv_lora_rank", None):
        raise _unsupported(name, "it has latent attention.")
    if getattr(config, "use_bidirectional_attention", None):
        raise _unsupported(name, "its attention is not causal.")
    foreign = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if foreign:
        raise _unsupported(name, f"it has layers of type {', '.join(sorted(foreign))}.")


def _context_length(config: Any) -> int:
    """`max_position_embeddings`; less where rotary scaling depends on the longest of a batch.

    "dynamic" and "longrope" leave positions below the original length alone, so that no sequence's
    answer depends on another's length there.
    """
    length: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            length = min(length, original or length)
    return length


def only_here(source: str) -> bool:
    """Whether to read `source` from this machine alone: a folder, or an id with no hub in reach.

    Asked first because the hub's own client retries for 20 seconds without a network.
    """
    if constants.HF_HUB_OFFLINE or Path(source).is_dir():
        return True
    import httpx  # `make gpu` runs without it, and only folders

    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError:
        return True
    return False


def _unsupported(name: str, reason: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"{name} cannot run here: {reason}", field="base_model", hint=HINT
    )


def _no_tokenizer(name: str, reason: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(
        f"{name} has no tokenizer that can be read: {reason}.",
        field="base_model",
        hint="Put tokenizer.json and tokenizer_config.json into its folder.",
    )


def refusing(what: str, *, hint: str) -> AbstractContextManager[None]:
    """Makes an UnsupportedError, `what` and the reason, of whatever is raised within.

    Errors of ours that have a reason already pass, and those for want of memory.
    """

    def refused(error: Exception) -> Exception:
        ours = isinstance(error, errors.WeaverError) and not isinstance(error, errors.EngineError)
        if ours or is_out_of_memory(error):
            return error
        said = f"{what}: {first_line(error)}"
        return errors.UnsupportedError(said, field="base_model", hint=hint)

    return converting(refused)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this machine, or the device, has no memory left for what was asked."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        said in str(error) for said in OUT_OF_MEMORY
    )


def first_line(error: BaseException) -> str:
    """What was raised, in at most 200 characters of one line."""
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
