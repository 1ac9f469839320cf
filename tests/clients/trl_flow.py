"""TRL's losses on given numbers: `trl_flow.py FOLDER`, in an environment of its own.

FOLDER has `batch.json`; each loss with its gradient is written to `trl.json` in it. The trainers'
own code computes, on a model that says what the batch says.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

FOLDER = Path(sys.argv[1])
BATCH: dict[str, Any] = json.loads((FOLDER / "batch.json").read_text())


class Alone:
    """What is asked of an accelerator in one process."""

    device = torch.device("cpu")

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values

    gather_for_metrics = gather


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(BATCH[name], dtype=torch.float64)


def says(log_probs: torch.Tensor) -> Any:
    """A model of these log-probabilities [B, T] behind the first token, of all but entropy."""
    zeros = torch.zeros_like(log_probs)

    def model(**_: Any) -> Any:
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    model.training = True  # type: ignore[attr-defined]
    return model


def trainer(kind: type, model: Any, **more: Any) -> Any:
    """One without its `__init__`, which wants data and a model with weights."""
    made = kind.__new__(kind)
    settings = {
        "model": model,
        "accelerator": Alone(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        **more,
    }
    for name, value in settings.items():
        object.__setattr__(made, name, value)
    return made


def graded(loss: torch.Tensor, *inputs: torch.Tensor) -> dict[str, Any]:
    gradients = torch.autograd.grad(loss, inputs)
    return {"loss": loss.item(), "gradients": [g.tolist() for g in gradients]}


def dpo(kind: str) -> dict[str, Any]:
    logprobs = torch.cat([tensor("chosen"), tensor("rejected")]).requires_grad_()
    mask = torch.cat([tensor("chosen_mask"), tensor("rejected_mask")]).long()
    masked = logprobs * mask
    one = trainer(
        DPOTrainer,
        says(masked),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        beta=BATCH["beta"],
        loss_types=["sigmoid" if kind == "dpo" else kind],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
    )
    inputs = whole(mask)
    for side in ("chosen", "rejected"):
        inputs[f"ref_{side}_logps"] = tensor(f"{side}_reference")
    return graded(one._compute_loss(one.model, inputs, False), logprobs)


def whole(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompts of one token with replies as long as the mask says."""
    padded = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)
    return {
        "input_ids": torch.ones_like(padded),
        "attention_mask": torch.ones_like(padded),
        "completion_mask": padded,
    }


def kto() -> dict[str, Any]:
    logprobs = torch.cat([tensor("chosen"), tensor("rejected")]).requires_grad_()
    mask = torch.cat([tensor("chosen_mask"), tensor("rejected_mask")]).long()
    one = trainer(
        KTOTrainer,
        says(logprobs * mask),
        beta=BATCH["beta"],
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda model, batch: tensor("other"),
    )
    inputs = whole(mask)
    inputs["label"] = torch.tensor([1] * len(BATCH["chosen"]) + [0] * len(BATCH["rejected"]))
    inputs["ref_logps"] = torch.cat([tensor("chosen_reference"), tensor("rejected_reference")])
    inputs["ref_KL_logps"] = tensor("other_reference")
    return graded(one._compute_loss(one.model, inputs, False), logprobs)


def means(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logprobs * mask).sum(1) / mask.sum(1)


def simpo() -> dict[str, Any]:
    sides = [tensor(side).requires_grad_() for side in ("chosen", "rejected")]
    settings = {"beta": BATCH["simpo_beta"], "simpo_gamma": BATCH["gamma"], "label_smoothing": 0.0}
    one = trainer(CPOTrainer, None, loss_type="simpo", alpha=0.0, **settings)
    masks = tensor("chosen_mask"), tensor("rejected_mask")
    losses, _, _ = one.cpo_loss(*map(means, sides, masks))
    return graded(losses.mean(), *sides)


def orpo() -> dict[str, Any]:
    """Its trainer computes in float32."""
    sides = [tensor(side).requires_grad_() for side in ("chosen", "rejected")]
    one = trainer(ORPOTrainer, None, beta=BATCH["beta"])
    masks = tensor("chosen_mask"), tensor("rejected_mask")
    chosen, rejected = map(means, sides, masks)
    losses = one.odds_ratio_loss(chosen, rejected)[0]
    return graded((-chosen - losses).mean(), *sides)


def bradley_terry(centre: float) -> dict[str, Any]:
    scores = torch.cat([tensor("chosen_score"), tensor("rejected_score")]).requires_grad_()

    def model(**_: Any) -> Any:
        return SimpleNamespace(logits=scores[:, None])

    model.training = True  # type: ignore[attr-defined]
    settings = SimpleNamespace(center_rewards_coefficient=centre or None)
    one = trainer(RewardTrainer, model, args=settings)
    inputs = {"margin": tensor("margin"), "attention_mask": torch.ones(len(scores), 1)}
    return graded(one.compute_loss(model, inputs), scores)


def gkd(beta: float, temperature: float) -> dict[str, Any]:
    student = tensor("student").requires_grad_()
    labels = torch.tensor(BATCH["labels"])
    loss = GKDTrainer.generalized_jsd_loss(
        student, tensor("teacher"), labels=labels, beta=beta, temperature=temperature
    )
    return graded(loss, student)


if __name__ == "__main__":
    told = {
        "dpo": dpo("dpo"),
        "ipo": dpo("ipo"),
        "kto": kto(),
        "simpo": simpo(),
        "orpo": orpo(),
        "bradley_terry": bradley_terry(0.0),
        "bradley_terry, centred": bradley_terry(BATCH["centre"]),
    }
    for beta, temperature in BATCH["gkd"]:
        told[f"gkd, beta {beta:g}, temperature {temperature:g}"] = gkd(beta, temperature)
    (FOLDER / "trl.json").write_text(json.dumps(told))
