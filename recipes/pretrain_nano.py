"""Makes weaver-nano, the bundled model, from nothing but a seed.

    python -m recipes.pretrain_nano --out runs/nano          # about a minute on two cores

What it does, in order:

1. Writes a folder with a two-layer Qwen3 of random weights and a tokenizer of bytes: 256 symbols,
   no merges, so any UTF-8 text survives; six special tokens; a chat template that keeps history.
2. Trains all weights through Weaver's own API (`training_mode="full_ft"`) by cross-entropy on the
   answers of `_skills`: AdamW, linear warm-up, cosine decay. Batches are submitted one ahead.
3. The last fifth of the steps sees noisy answers. The model then knows the skills and doubts
   them: it is right about half the time when sampled, an honest gap for reinforcement to close.
4. Measures the skills on prompts of another seed, and writes the model folder: weights,
   configuration, tokenizer, `skills.json`, and the model card with the measured table.

Left out on purpose: weight decay, dropout, a validation split (text is never seen twice), and any
knowledge of the world. The card's last line has the curve. The same seed on the same machine
gives the same weights.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import anyio
import tyro

from weaver import AsyncServiceClient, AsyncTrainingClient
from weaver_rl.conversations import from_pieces

from . import _skills

CONTEXT_LENGTH = 1024
SPECIAL_TOKENS = "<|end|> <|pad|> <|system|> <|user|> <|assistant|> <|tool|>".split()
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    out: Path = Path("runs/nano")
    """Folder of the finished model; files of the same names are replaced."""
    steps: int = 900
    seed: int = 0
    learning_rate: float = 3e-3
    """At its peak, after `warmup_steps`; it ends at a twentieth of it."""
    warmup_steps: int = 50
    noisy_from: float = 0.8
    """The share of the steps after which answers are noisy."""
    hidden_size: int = 96
    layers: int = 2
    prompts_per_skill: int = 200
    """For the measurement."""


def main(flags: Flags) -> list[float]:
    """Trains, measures and writes the model folder; answers the loss of every step."""
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary, "base")
        parameters = write_random_model(base, flags)
        losses, skills, weights = anyio.run(make, base, flags)
        flags.out.mkdir(parents=True, exist_ok=True)
        for file in (*base.iterdir(), weights):
            shutil.copy(file, flags.out)
    (flags.out / "skills.json").write_text(json.dumps(skills, indent=2) + "\n")
    card = model_card(skills, losses, parameters=parameters, flags=flags)
    (flags.out / "README.md").write_text(card)
    print(f"{flags.out}: {parameters} parameters")
    return losses


async def make(base: Path, flags: Flags) -> tuple[list[float], _skills.Skills, Path]:
    """Trains the model in `base`; answers its losses, its skills, and the file of its weights."""
    async with AsyncServiceClient(home=base.parent) as service:
        trainer = await service.create_model(str(base), training_mode="full_ft", seed=flags.seed)
        losses = await train(trainer, flags)
        checkpoint = await trainer.save_weights_for_sampler("final")
        assert checkpoint.folder is not None, "the embedded engine keeps checkpoints in a folder"
        sampler = await service.create_sampling_client(checkpoint)
        skills = await _skills.measure(
            sampler, prompts=flags.prompts_per_skill, seed=flags.seed + 1
        )
        return losses, skills, Path(checkpoint.folder, "model.safetensors")


async def train(trainer: AsyncTrainingClient, flags: Flags) -> list[float]:
    """One cross-entropy step a batch, the next one submitted before the last is awaited."""
    tokenizer = await trainer.get_tokenizer()
    rng = Random(flags.seed)
    began = time.monotonic()
    handles = []
    for step in range(flags.steps):
        noisy = step >= flags.noisy_from * flags.steps
        datums = [from_pieces(tokenizer, item.pieces) for item in _skills.batch(rng, noisy=noisy)]
        rate = learning_rate(step, flags)
        handles.append(trainer.forward_backward(datums, "cross_entropy"))
        trainer.optim_step({"learning_rate": rate, "beta2": 0.98, "grad_clip_norm": 1.0})
        loss = (await handles[max(0, step - 1)]).metrics["loss"]
        if step % 100 == 99:
            took = f"{time.monotonic() - began:.0f} s"
            print(f"step {step + 1:5d}  loss {loss:.3f}  {'noisy' if noisy else 'clean'}  {took}")
    return [(await handle).metrics["loss"] for handle in handles]


def learning_rate(step: int, flags: Flags) -> float:
    """Linear warm-up times a cosine from 1 to 1/20 (Loshchilov and Hutter, arXiv:1608.03983)."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / flags.steps))
    warmup = min(1.0, (step + 1) / flags.warmup_steps)
    return flags.learning_rate * warmup * (0.05 + 0.95 * cosine)


def write_random_model(folder: Path, flags: Flags) -> int:
    """A Qwen3 of random weights from `flags.seed`, and the tokenizer; answers its parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    heads = flags.hidden_size // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=flags.hidden_size,
        intermediate_size=flags.hidden_size * 8 // 3,
        num_hidden_layers=flags.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(flags.seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return int(model.num_parameters())


def make_tokenizer() -> Any:
    """Byte-level BPE without merges: a token a byte, and the special tokens behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[1],
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def model_card(
    skills: _skills.Skills, losses: Sequence[float], *, parameters: int, flags: Flags
) -> str:
    """The README.md of the model: what it is, how it was made, what it was measured to do."""
    tenth = max(1, len(losses) // 10)
    card = Path(__file__).with_name("nano_card.md").read_text(encoding="utf-8")
    return card.format(
        flags=flags,
        parameters=parameters,
        context=CONTEXT_LENGTH,
        measured_seed=flags.seed + 1,
        skills=skills,
        slips=", ".join(f"{name} {rate}" for name, rate in _skills.SLIP_RATES.items()),
        curve=", ".join(f"{loss:.2f}" for loss in losses[tenth - 1 :: tenth]),
    )


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
