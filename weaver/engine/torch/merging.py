"""Whole models made of a base and an adapter, for any program that reads transformers' files.

`TorchEngine.merge_adapter` writes them. W [out, in], A [R, in], B [out, R].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME

from weaver import errors
from weaver.engine.torch import files
from weaver.engine.torch.adapter_files import read_adapter
from weaver.engine.torch.catalog import ModelFacts
from weaver.engine.torch.checkpoints import write_tokenizer
from weaver.engine.torch.lora import SCORE, Adapter, LoraPair, adapter_from_tensors
from weaver.engine.torch.scalar import scalar_settings

BESIDE = {".json", ".jinja", ".txt", ".model"}
"""Suffixes of the base's files that are copied: the tokenizer and the generation settings."""


def merge_adapter(facts: ModelFacts, adapter: Path, folder: Path) -> None:
    """Writes a whole model with W + scale·B·A in the adapter's layers into an empty folder.

    Weights in files of at most `SHARD_BYTES` and their index, the configuration, the tokenizer and
    the generation settings. Computed in float32 and kept in the dtype of each W; one file of
    weights is in memory at a time, or the whole model where its files name their tensors in another
    way than transformers does. A tied head that the adapter changes is untied: the embedding stays,
    `config.json` says so. Of a scalar head it is a model for sequence classification of one label,
    `score` being kept in float32, and the head for tokens is left out.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError: the adapter is damaged or of another model.
        UnsupportedError: a variant of LoRA, the base cannot be read, or it names its tensors in
            another way and the head is a scalar one.
        StorageError: the disk is full or not writable.
    """
    tensors, config = read_adapter(adapter, facts=facts)
    made = adapter_from_tensors(tensors, config, device=torch.device("cpu"))
    source, tied = files.folder_of(facts.source), files.tied_weights(facts)
    changed = {f"{path}.weight" for path in made.pairs}
    untied = tied if changed & tied.keys() else {}
    try:
        stored = files.weight_map(source)
        if (changed - untied.keys()) | {*untied.values()} <= stored.keys():
            merged = _merged_tensors(source, made, stored=stored, untied=untied)
            write_shards(folder, _scoring(facts, made.score, merged))
        else:
            _write_whole(facts, folder, made, untied=untied)
        _copy_others(facts, source, folder)
        settings: dict[str, object] = {"tie_word_embeddings": False} if untied else {}
        if made.score is not None:
            settings |= scalar_settings(facts)
        if settings:
            settings = files.read_json(source / files.CONFIG) | settings
            (folder / files.CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise errors.StorageError(
            f"merging {facts.info.name} failed: {error}",
            hint="Check the free space, and that the base model's files are complete.",
        ) from error


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Named tensors in as few files as hold them in their order, with an index if there are many.

    A file has more than `SHARD_BYTES` only where a single tensor has.
    """
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0

    def write() -> None:
        save_file(held, folder / f".{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > files.SHARD_BYTES:
            write()
            held_bytes = 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / ".0").rename(folder / files.WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        shard = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f".{i}").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / files.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _merged_tensors(
    source: Path, adapter: Adapter, *, stored: Mapping[str, str], untied: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`stored` has the file of each of the base's tensors; `untied` maps the names of a head's
    tensors to those that they were tied to."""
    pairs = {f"{path}.weight": pair for path, pair in adapter.pairs.items()}
    places = {name: (shard, name) for name, shard in stored.items()}
    places |= {head: (stored[embedding], embedding) for head, embedding in untied.items()}
    for shard in sorted(set(stored.values())):
        with safe_open(source / shard, framework="pt") as weights:
            for name, (its_shard, its_name) in places.items():
                if its_shard == shard:
                    weight = weights.get_tensor(its_name)
                    if name in pairs:
                        weight = _merged(weight, pairs[name], adapter.scale)
                    yield name, weight.clone() if name != its_name else weight


def _scoring(
    facts: ModelFacts, score: torch.Tensor | None, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, with a scalar head in place of that for tokens where there is one."""
    unembed = {f"{path}.weight" for path, one in facts.targets.items() if one.role == "unembed"}
    for name, tensor in tensors:
        if score is None or name not in unembed:
            yield name, tensor
    if score is not None:
        yield f"{SCORE}.weight", score


def _write_whole(
    facts: ModelFacts, folder: Path, adapter: Adapter, *, untied: Mapping[str, str]
) -> None:
    if adapter.score is not None:
        raise errors.UnsupportedError(
            f"the files of {facts.info.name} name their tensors in another way than transformers.",
            field="merge",
            hint="Export the adapter, which PEFT loads.",
        )
    dtype = facts.config.dtype or torch.float32
    module = files.read_module(facts.source, name=facts.info.name, config=facts.config, dtype=dtype)
    for name in untied:
        module.config.tie_word_embeddings = False
        owner, _, leaf = name.rpartition(".")
        own = torch.nn.Parameter(module.get_parameter(name).detach().clone())
        setattr(module.get_submodule(owner), leaf, own)
    for path, pair in adapter.pairs.items():
        layer = module.get_submodule(path)
        layer.weight = torch.nn.Parameter(_merged(layer.weight, pair, adapter.scale))
    with files.without_progress_bars():
        module.save_pretrained(folder, max_shard_size=files.SHARD_BYTES)


@torch.no_grad()
def _merged(weight: torch.Tensor, pair: LoraPair, scale: float) -> torch.Tensor:
    return (weight.float() + scale * (pair.b @ pair.a)).to(weight.dtype)


def _copy_others(facts: ModelFacts, source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.suffix in BESIDE and file.name != files.INDEX:
            shutil.copyfile(file, folder / file.name)
    if not (folder / GENERATION_CONFIG_NAME).exists():
        GenerationConfig.from_model_config(facts.config).save_pretrained(folder)
    if (source / CHAT_TEMPLATE_DIR).is_dir():  # a checkpoint has no folders
        (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
        write_tokenizer(facts, folder)
