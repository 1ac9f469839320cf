"""`judge`: one architecture, from its configuration to an export, against transformers and PEFT."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.compatibility.tiny import VOCAB, save_tiny, tiny_config
from tests.engine.conftest import datum, job, randomise
from tests.engine.sampler_kit import sample_job, save_tokenizer
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.files import without_progress_bars
from weaver.errors import UnsupportedError, WeaverError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection

BOUND = 1e-4
MEMORY_BYTES = 8 * 2**30
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one architecture; differences are the largest, in nats, or relative for gradients."""

    name: str
    verdict: str
    """`right`, `refused`, `untried` (no tiny model can be made) or `WRONG`."""
    reason: str = ""
    prefill: float | None = None
    decode: float | None = None
    training: float | None = None
    export: float | None = None


def judge(name: str) -> Verdict:
    """In a process of its own, since models may crash it or never end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(TIMEOUT_S):
            return ours.recv()
        return Verdict(name=name, verdict="WRONG", reason=f"not done in {TIMEOUT_S} s")
    except EOFError:
        process.join()
        return Verdict(name=name, verdict="WRONG", reason=f"ended by code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, without_progress_bars():
        pipe.send(_judged(name, Path(folder)))


def _judged(name: str, folder: Path) -> Verdict:
    base = folder / "base"
    try:
        save_tiny(tiny_config(name), base)
        save_tokenizer(base)
        reference = _eager(base)
        with torch.no_grad():
            _logprobs(reference, _tokens(40))
    except Exception as error:
        return _unmade(name, folder / "full-size", _first_line(error))
    try:
        engine = TorchEngine({"base": base}, allow_paths=False, threads=1)
        config = _open(engine)
    except UnsupportedError as error:
        return Verdict(name=name, verdict="refused", reason=_plain(error))
    except Exception as error:
        return Verdict(name=name, verdict="WRONG", reason=f"at opening: {_first_line(error)}")
    found: dict[str, float] = {}
    try:
        with torch.no_grad():
            found["prefill"], found["decode"] = _sampling(engine, "base-weights", reference)
        found["training"] = max(_training(engine, base, config), _full(engine, base))
        found["export"] = _export(engine, base, folder, config)
    except Exception as error:
        reason = f"accepted, then {type(error).__name__}: {_first_line(error)}"
        return Verdict(name=name, verdict="WRONG", reason=reason, **found)
    worst = max(found.values())
    return Verdict(
        name=name,
        verdict="right" if worst <= BOUND else "WRONG",
        reason="" if config.train_mlp else "adapters leave out the MLP (`train_mlp=False`)",
        **found,
    )


def _unmade(name: str, folder: Path, trouble: str) -> Verdict:
    """Of what cannot be made tiny: whether its own configuration is refused for another reason."""
    try:
        CONFIG_MAPPING[name]().save_pretrained(folder)
        Catalog({"base": folder}, allow_paths=False).facts("base")
    except UnsupportedError as error:
        if trouble.partition(": ")[2][:60] not in error.message:
            return Verdict(name=name, verdict="refused", reason=_plain(error))
    except Exception as error:
        trouble += f"; {_first_line(error)}"
    return Verdict(name=name, verdict="untried", reason=trouble)


def _open(engine: TorchEngine) -> LoraConfig:
    """A run, of as much as can be adapted; it and a sampler are made."""
    config = LoraConfig(rank=2, alpha=4, seed=3, train_unembed=True)
    for _ in range(3):
        try:
            engine.trainer.create_run(
                "lora", "base", training_mode="lora", lora_config=config, seed=0
            )
            break
        except UnsupportedError as error:
            if not (error.field or "").startswith("lora_config."):
                raise
            config = config.model_copy(update={error.field.partition(".")[2]: False})
    engine.trainer.create_run("full", "base", training_mode="full_ft", lora_config=None, seed=0)
    engine.sampler.load("base-weights", "base", None)
    randomise(engine.trainer, "lora")
    return config


def _sampling(engine: TorchEngine, weights_id: str, reference: Any) -> tuple[float, float]:
    """Largest differences of log-probabilities of prompts, and of what was drawn."""
    engine.sampler._prefill_tokens = 16
    prompts = [_tokens(40), _tokens(21, seed=1), _tokens(3, seed=2)]
    jobs = [
        sample_job(
            p, str(i), weights_id=weights_id, n=2, prompt_logprobs=True, max_tokens=20, seed=i
        )
        for i, p in enumerate(prompts)
    ]
    for each in jobs:
        engine.sampler.add(each)
    prefill = decode = 0.0
    while engine.sampler.busy:
        for progress in engine.sampler.step():
            if progress.error:
                raise progress.error
            if progress.result is None:
                continue
            prompt = prompts[int(progress.job_id)]
            for sequence in progress.result.sequences:
                right = _logprobs(reference, [*prompt, *sequence.tokens])
                n = len(prompt) - 1
                prefill = max(prefill, _gap(progress.result.prompt_logprobs[1:], right[:n]))
                decode = max(decode, _gap(sequence.logprobs, right[n:]))
    return prefill, decode


def _training(engine: TorchEngine, base: Path, config: LoraConfig) -> float:
    """Of log-probabilities and gradients (relative to the largest) of an adapter, against PEFT."""
    adapted = _adapted(engine, base, config)
    return _gradients(engine, "lora", *adapted)


def _adapted(
    engine: TorchEngine, base: Path, config: LoraConfig
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with the run's adapter, by PEFT, and the adapter's parameters in it.

    PEFT cannot adapt single layers that transformers fuses in files: there, hooks add sBAx.
    """
    tensors = engine.trainer.snapshot("lora").tensors
    paths = sorted({n.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for n in tensors})
    rank, alpha = config.rank, config.alpha
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=paths, task_type="CAUSAL_LM"
    )
    try:
        adapted = peft.get_peft_model(_eager(base), settings).eval()
        theirs = {
            n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n
        }
    except ValueError:
        adapted = _eager(base).requires_grad_(False)
        theirs = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        for path in paths:
            a, b = (theirs[f"base_model.model.{path}.lora_{m}.weight"] for m in "AB")
            adapted.get_submodule(path).register_forward_hook(
                lambda _, inputs, y, a=a, b=b: y + alpha / rank * inputs[0] @ a.to(y).T @ b.to(y).T
            )
    assert theirs.keys() == tensors.keys()
    for name, parameter in theirs.items():
        parameter.data.copy_(tensors[name])
    return adapted, theirs


def _full(engine: TorchEngine, base: Path) -> float:
    reference = _eager(base).requires_grad_()
    return _gradients(engine, "full", reference, dict(reference.named_parameters()))


def _gradients(
    engine: TorchEngine, run_id: str, reference: Any, parameters: Mapping[str, torch.Tensor]
) -> float:
    """Also of the reference in float64 where it is needed: CTRL's own float32 loses 1e-3."""
    sequences = [_tokens(n, seed=n) for n in (30, 30, 4, 47)]
    [result] = engine.trainer.forward_backward([job(run_id, [datum(s) for s in sequences])])
    if isinstance(result, WeaverError):
        raise result
    logprobs = torch.cat([o["logprobs"].to_torch() for o in result.loss_fn_outputs])
    run = engine.trainer._run(run_id)
    assert run.gradient is not None
    ours = dict(zip(run.named_parameters(), run.gradient, strict=True))
    assert ours.keys() == parameters.keys()
    gap = float("inf")
    for _ in range(2):
        right = torch.cat([_logprobs(reference, s) for s in sequences])
        right.mean().neg().backward()
        gap = max(_gap(logprobs, right.detach()), _gradient_gap(ours, parameters))
        if gap <= BOUND:
            break
        reference.double().zero_grad()
    return gap


def _gradient_gap(
    ours: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> float:
    """The largest difference of a parameter's gradient, relative to the largest gradient."""
    right = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    largest = max(float(gradient.norm()) for gradient in right.values())
    return max(float((ours[n] - gradient).norm()) for n, gradient in right.items()) / largest


def _export(engine: TorchEngine, base: Path, folder: Path, config: LoraConfig) -> float:
    """Of the merged adapter, and of the fully trained model, as transformers reads them."""
    tokens = _tokens(40)
    for name in ("adapter", "merged", "full"):
        (folder / name).mkdir()
    engine.trainer.save("lora", include_optimizer=False)(folder / "adapter")
    engine.merge_adapter("base", folder / "adapter", folder / "merged")
    engine.trainer.save("full", include_optimizer=False)(folder / "full")
    adapted, _ = _adapted(engine, base, config)
    pairs = [(folder / "merged", adapted), (folder / "full", _eager(base))]
    with torch.no_grad():
        return max(
            _gap(_logprobs(_eager(path), tokens), _logprobs(right, tokens)) for path, right in pairs
        )


def _eager(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def _logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of each token behind the first: [T-1]."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def _gap(ours: Any, right: torch.Tensor) -> float:
    gap = float((torch.as_tensor(ours).double() - right).abs().max())
    return gap if gap == gap else float("inf")


def _tokens(length: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def _plain(error: UnsupportedError) -> str:
    return error.message.partition(" cannot run here: ")[2] or error.message


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
