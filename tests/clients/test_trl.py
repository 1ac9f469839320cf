"""Losses of preferences, rewards and distillation, by us and by the published TRL, on one batch.

`make test-trl` makes TRL's environment (.venv-trl) and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from weaver.losses import LOSSES as ENGINE_LOSSES
from weaver.losses import Tokens
from weaver_rl.divergences import divergence
from weaver_rl.preference_losses import LOSSES, Batch, Replies

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = [pytest.mark.clients, pytest.mark.slow]

PYTHON = Path(__file__).parents[2] / ".venv-trl" / "bin" / "python"
B, T, V = 6, 9, 32
SINGLE = ("orpo", "kto")
"""TRL computes a part of these in float32."""


def batch() -> dict[str, Any]:
    """Replies of 2 to T tokens, what a reference and other prompts say, and logits of V tokens."""
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {"beta": 0.3, "simpo_beta": 2.0, "gamma": 0.7}
    for side in ("chosen", "rejected"):
        made[side] = (-rng.uniform(0.05, 3.0, (B, T))).tolist()
        lengths = rng.integers(2, T + 1, B)
        made[f"{side}_mask"] = (np.arange(T) < lengths[:, None]).astype(float).tolist()
        made[f"{side}_reference"] = (-rng.uniform(1, 20, B)).tolist()
        made[f"{side}_score"] = rng.normal(0, 3, B).tolist()
    made["margin"], made["centre"] = rng.uniform(0, 2, B).tolist(), 0.05
    made["other"] = (-rng.uniform(1, 20, 2 * B)).tolist()
    made["other_reference"] = (np.array(made["other"]) - rng.uniform(-1, 2, 2 * B)).tolist()
    made["student"] = (3 * rng.normal(size=(2, T, V))).tolist()
    made["teacher"] = (3 * rng.normal(size=(2, T, V))).tolist()
    labels = rng.integers(0, V, (2, T))
    labels[0, :3] = labels[1, :5] = -100
    made["labels"] = labels.tolist()
    made["gkd"] = [[beta, t] for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for t in (1.0, 2.0)]
    return made


def of_trl(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "batch.json").write_text(json.dumps(given))
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("trl_flow.py"), folder],
        env={**env, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads((folder / "trl.json").read_text())
    return told


def preferred(name: str, given: Mapping[str, Any]) -> tuple[float, list[Any]]:
    """Our loss, and its gradient for each token's log-probability."""
    logprobs, sides = [], {}
    for side in ("chosen", "rejected"):
        tokens = torch.tensor(given[side], dtype=torch.float64, requires_grad=True)
        mask = torch.tensor(given[f"{side}_mask"], dtype=torch.float64)
        logprobs.append(tokens)
        sides[side] = Replies(
            logprobs=(tokens * mask).sum(1),
            reference=torch.tensor(given[f"{side}_reference"], dtype=torch.float64),
            lengths=mask.sum(1),
            given=torch.ones(B, dtype=torch.float64),
        )
    strayed = np.subtract(given["other"], given["other_reference"]).mean()
    loss = LOSSES[name].formula(
        Batch(
            **sides,
            beta=given["simpo_beta" if name == "simpo" else "beta"],
            gamma=given["gamma"],
            label_smoothing=0.0,
            kl=torch.tensor(strayed),
        )
    )
    return loss.item(), [g.tolist() for g in torch.autograd.grad(loss, logprobs)]


def scored(given: Mapping[str, Any], centre: float) -> tuple[float, list[Any]]:
    """The loss of reward models, as the engine has it, and its gradient for each score."""
    sides = (given["chosen_score"], given["rejected_score"])
    scores = torch.tensor(sides, dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([given["margin"], [0.0] * B], dtype=torch.float64)
    tokens = Tokens(
        lp=scores.T.reshape(-1),  # pairs, the preferred first
        inputs={"margin": margins.T.reshape(-1)},
        counted=torch.ones(2 * B, dtype=torch.bool),
        datum=torch.arange(2 * B),
    )
    loss = ENGINE_LOSSES["bradley_terry"](centre=centre).per_token(tokens).value.mean()
    return loss.item(), [g.tolist() for g in torch.autograd.grad(loss, [scores])]


def distilled(given: Mapping[str, Any], beta: float, temperature: float) -> tuple[float, list[Any]]:
    """Ours with all V tokens as the teacher's likeliest, and its gradient for the logits."""
    student = torch.tensor(given["student"], dtype=torch.float64, requires_grad=True)
    at = torch.tensor(given["labels"]) != -100
    teacher = torch.tensor(given["teacher"], dtype=torch.float64)[at].log_softmax(-1)
    order = teacher.argsort(-1, descending=True)
    q, p = (x.gather(-1, order) for x in (student[at].log_softmax(-1), teacher))
    loss = divergence(q, p, beta=beta, temperature=temperature).mean()
    return loss.item(), [g.tolist() for g in torch.autograd.grad(loss, [student])]


def test_losses_and_gradients_are_those_of_trl(tmp_path: Path) -> None:
    given = batch()
    told = of_trl(given, tmp_path)
    ours = {name: preferred(name, given) for name in ("dpo", "kto", "simpo", "orpo")}
    ours["bradley_terry"] = scored(given, 0.0)
    ours["bradley_terry, centred"] = scored(given, given["centre"])
    for beta, temperature in given["gkd"]:
        name = f"gkd, beta {beta:g}, temperature {temperature:g}"
        ours[name] = distilled(given, beta, temperature)
    apart = {}
    for name, (loss, gradients) in ours.items():
        flat = np.concatenate([np.ravel(g) for g in gradients])
        theirs = np.concatenate([np.ravel(g) for g in told[name]["gradients"]])
        assert abs(loss) > 1e-2 and np.abs(flat).max() > 1e-4
        apart[name] = abs(loss - told[name]["loss"]), float(np.abs(flat - theirs).max())
    print(json.dumps(apart, indent=1))  # noqa: T201
    assert len(apart) == 16 and max(map(max, apart.values())) < 1e-5, apart


def test_their_ipo_is_ours_of_means(tmp_path: Path) -> None:
    """TRL divides log π − log π_ref of a reply by its tokens; equation 17 does not."""
    given = batch()
    told = of_trl(given, tmp_path)["ipo"]["loss"]
    lengths = {side: np.sum(given[f"{side}_mask"], 1) for side in ("chosen", "rejected")}
    means = {
        **given,
        **{s: (np.array(given[s]) / n[:, None]).tolist() for s, n in lengths.items()},
        **{f"{s}_reference": (given[f"{s}_reference"] / n).tolist() for s, n in lengths.items()},
    }
    assert preferred("ipo", means)[0] == pytest.approx(told, abs=1e-5)
    assert abs(preferred("ipo", given)[0] - told) > 0.1
