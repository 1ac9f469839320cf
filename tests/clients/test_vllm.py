"""A trained adapter as it is exported, by transformers, PEFT and vLLM: the same log-probabilities.

`make test-vllm` makes vLLM's environment (.venv-vllm) and runs this.
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
from transformers import AutoModelForCausalLM

from tests.clients.server import WEAVER
from tests.optional import peft
from weaver import Datum, ServiceClient

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [
    pytest.mark.clients,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
LEARNED = [5 + 3 * i for i in range(40)]
TOKENS = [5 + (7 * i * i + 3 * i) % 240 for i in range(60)]


def trained(home: Path) -> tuple[str, Sequence[float], Sequence[float]]:
    """A checkpoint's path; the log-probabilities of `TOKENS` by our sampler, and by the base."""
    datum = Datum(model_input=LEARNED[:-1], loss_fn_inputs={"target_tokens": LEARNED[1:]})
    with ServiceClient(home=home) as service:
        trainer = service.create_model("weaver-nano", {"rank": 8})
        for _ in range(8):
            trainer.forward_backward([datum])
            trainer.optim_step({"learning_rate": 3e-3}, wait=True)
        path = trainer.save_weights_for_sampler("mine").path
        ours = service.create_sampling_client(path).compute_logprobs(TOKENS)
        base = service.create_sampling_client(base_model="weaver-nano").compute_logprobs(TOKENS)
    return path, [lp or 0.0 for lp in ours[1:]], [lp or 0.0 for lp in base[1:]]


@torch.no_grad()
def of_model(model: Any) -> Sequence[float]:
    log_p = model.eval()(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    return [float(log_p[i, token]) for i, token in enumerate(TOKENS[1:])]


def of_vllm(folder: Path) -> dict[str, Sequence[float]]:
    (folder / "tokens.json").write_text(json.dumps(TOKENS))
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", Path(__file__).with_name("vllm_flow.py"), folder],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Sequence[float]] = json.loads((folder / "vllm.json").read_text())
    return told


def test_all_say_the_same_of_a_trained_adapter(tmp_path: Path) -> None:
    path, ours, base = trained(tmp_path / "home")
    env = {**os.environ, "WEAVER_HOME": str(tmp_path / "home")}
    for name, options in (("adapter", ()), ("model", ("--merge",))):
        command = [WEAVER, "checkpoints", "export", path, "--to", tmp_path / name, *options]
        subprocess.run(command, env=env, check=True, timeout=120)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    theirs = {
        "transformers and PEFT": of_model(adapted),
        "the merged model": of_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model")),
    }
    vllm = of_vllm(tmp_path)
    theirs |= {f"vLLM, {how}": values for how, values in vllm.items()}
    apart = {how: float(np.abs(np.subtract(ours, told)).max()) for how, told in theirs.items()}
    print(apart)  # noqa: T201
    assert len(apart) == 4 and max(apart.values()) < 1e-3, apart
    merged = np.subtract(theirs["the merged model"], theirs["transformers and PEFT"])
    assert np.abs(merged).max() < 5e-5
    assert np.abs(np.subtract(ours, base)).max() > 0.1
