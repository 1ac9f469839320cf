"""The fake engine's `Trainer`: exact gradients of its two weight rows, and AdamW.

Left out: `gspo`, and the options of the ratio losses beyond their clips.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.fake_engine.model import BASE, VOCAB, Floats, log_softmax, logits, read_weights
from weaver.checks import weights_of
from weaver.engine.blocking import WeightSnapshot
from weaver.errors import NoGradientsError, NonFiniteError, UnsupportedError, WeaverError
from weaver.tensors import TensorData
from weaver.types import ForwardBackwardResult, OptimStepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.fake_engine import FakeEngine
    from weaver.engine.base import GradientJob
    from weaver.types import AdamParams, Datum, LoraConfig, TrainingMode


@dataclass(slots=True)
class _Run:
    base_model: str
    training_mode: TrainingMode
    lora_config: LoraConfig | None
    weights: Floats = field(default_factory=BASE.copy)
    moments: Floats = field(default_factory=lambda: np.zeros((2, 2, VOCAB)))
    gradient: Floats | None = None
    step: int = 0


def _token_losses(datum: Datum, lp: Floats, job: GradientJob) -> tuple[Floats, Floats]:
    """Losses and their derivatives by `lp`, in its shape, [T] or [T, K]; see `weaver.losses`."""
    data = {name: value.to_numpy().astype(float) for name, value in datum.loss_fn_inputs.items()}
    options = {k: float(v) for k, v in job.loss_fn_config.items() if not isinstance(v, str)}
    if job.loss_fn == "surrogate":
        c = data["surrogate_weights"]
        return c * lp, c
    w = weights_of(datum).astype(float)
    if job.loss_fn == "cross_entropy":
        return -w * lp, -w
    q, a = data["logprobs"], data["advantages"]
    r = np.exp(lp - q)
    clipped = np.clip(
        r, options.get("clip_low_threshold", 0), options.get("clip_high_threshold", np.inf)
    )
    match job.loss_fn:
        case "importance_sampling":
            return -w * r * a, -w * r * a
        case "ppo":
            return -w * np.minimum(r * a, clipped * a), -w * r * a * (r * a <= clipped * a)
        case "cispo":
            return -w * clipped * lp * a, -w * clipped * a
        case "dro":
            beta = options["beta"]
            return -w * (lp * a - beta / 2 * (lp - q) ** 2), -w * (a - beta * (lp - q))
    raise UnsupportedError(f"the fake engine has no {job.loss_fn}.", field="loss_fn")


class FakeTrainer:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._runs: dict[str, _Run] = {}

    def create_run(
        self,
        run_id: str,
        base_model: str,
        *,
        training_mode: TrainingMode,
        lora_config: LoraConfig | None,
        seed: int,
    ) -> None:
        with self._engine.call("create_run", run_id):
            self._engine.get_model(base_model)
            self._runs[run_id] = _Run(base_model, training_mode, lora_config)

    def forward_backward(
        self, jobs: Sequence[GradientJob]
    ) -> Sequence[ForwardBackwardResult | WeaverError]:
        with self._engine.call("forward_backward", jobs):
            return [self._forward_backward(job) for job in jobs]

    def _forward_backward(self, job: GradientJob) -> ForwardBackwardResult | WeaverError:
        run = self._runs[job.run_id]
        temperature = float(job.loss_fn_config.get("temperature", 1.0))
        gradient, outputs, loss_sum, weight_sum = np.zeros((2, VOCAB)), [], 0.0, 0.0
        try:
            self._engine.hook("gradient", job)
            for datum in job.datums:
                tokens = np.array(datum.model_input.to_ints())
                targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
                row_logits, distances = logits(run.weights, tokens)
                all_lp = log_softmax(row_logits / temperature)
                at = np.arange(len(tokens))[:, None], targets.reshape(len(tokens), -1)
                lp = all_lp[at].reshape(targets.shape)
                losses, slopes = _token_losses(datum, lp, job)
                slopes = slopes.reshape(len(tokens), -1)
                by_logit = -slopes.sum(1, keepdims=True) * np.exp(all_lp)
                np.add.at(by_logit, at, slopes)
                gradient[0] += by_logit.sum(0) / temperature
                gradient[1] += np.bincount(distances.ravel(), by_logit.ravel(), VOCAB) / temperature
                loss_sum += float(losses.sum())
                weight_sum += float(weights_of(datum).sum())
                outputs.append({"logprobs": TensorData(lp.astype(np.float32))})
        except WeaverError as error:
            return error
        scale = 1.0
        if "denominator" in job.loss_fn_config:
            scale = float(job.loss_fn_config["denominator"])
        elif job.loss_fn_config["reduction"] == "mean" and job.loss_fn != "surrogate":
            scale = weight_sum or 1.0
        if not np.isfinite(loss_sum) or not np.isfinite(gradient).all():
            return NonFiniteError("the loss is not finite.", field="datums")
        if job.backward:
            run.gradient = gradient / scale + (0.0 if run.gradient is None else run.gradient)
        metrics = {
            "loss": loss_sum / scale,
            "loss_sum": loss_sum,
            "weight_sum": weight_sum,
            "num_tokens": float(sum(datum.model_input.length for datum in job.datums)),
        }
        return ForwardBackwardResult(loss_fn_outputs=tuple(outputs), metrics=metrics)

    def optim_step(self, run_id: str, params: AdamParams) -> OptimStepResult:
        with self._engine.call("optim_step", run_id):
            run = self._runs[run_id]
            gradient = run.gradient
            if gradient is None:
                raise NoGradientsError(
                    "no gradient was accumulated.", hint="Call forward_backward first."
                )
            run.gradient = None
            norm = float(np.linalg.norm(gradient))
            if params.grad_clip_norm and norm > params.grad_clip_norm:
                gradient = gradient * (params.grad_clip_norm / norm)
            run.step += 1
            m, v = run.moments
            m += (1 - params.beta1) * (gradient - m)
            v += (1 - params.beta2) * (gradient**2 - v)
            m_hat = m / (1 - params.beta1**run.step)
            v_hat = v / (1 - params.beta2**run.step)
            decay = params.weight_decay * run.weights
            update = m_hat / (np.sqrt(v_hat) + params.eps) + decay
            run.weights = run.weights - params.learning_rate * update
            return OptimStepResult(
                metrics={
                    "grad_norm": norm,
                    "learning_rate": params.learning_rate,
                    "step": run.step,
                }
            )

    def clear_gradients(self, run_id: str) -> None:
        with self._engine.call("clear_gradients", run_id):
            self._runs[run_id].gradient = None

    def step(self, run_id: str) -> int:
        return self._runs[run_id].step

    def snapshot(self, run_id: str) -> WeightSnapshot:
        with self._engine.call("snapshot", run_id):
            run = self._runs[run_id]
            return WeightSnapshot(
                base_model=run.base_model,
                lora_config=run.lora_config,
                version=run.step,
                tensors={"weight": run.weights},  # optim_step replaces it, never writes into it
            )

    def save(self, run_id: str, *, include_optimizer: bool) -> Callable[[Path], None]:
        with self._engine.call("save", run_id):
            run = self._runs[run_id]
            weights, moments = run.weights, run.moments.copy()  # the weights are replaced
            state = {"base_model": run.base_model, "step": run.step}

        def write(folder: Path) -> None:
            self._engine.hook("write", folder)
            np.save(folder / "weight.npy", weights)
            if include_optimizer:
                np.save(folder / "optimizer.npy", moments)
            (folder / "state.json").write_text(json.dumps(state))

        return write

    def load(self, run_id: str, folder: Path, *, include_optimizer: bool) -> None:
        with self._engine.call("load", folder):
            run = self._runs[run_id]
            weights, step = read_weights(folder, run.base_model)
            moments = np.load(folder / "optimizer.npy") if include_optimizer else 0 * run.moments
            run.weights, run.step, run.moments, run.gradient = weights, step, moments, None

    def delete_run(self, run_id: str) -> None:
        with self._engine.call("delete_run", run_id):
            self._runs.pop(run_id, None)
