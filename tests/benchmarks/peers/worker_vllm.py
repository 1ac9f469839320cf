"""vLLM with adapters in PEFT's layout, which it is given as a folder: `worker_vllm.py FOLDER`."""

from __future__ import annotations

import sys
import tempfile
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers import worker
from tests.benchmarks.peers.worker_peft import TARGETS

if TYPE_CHECKING:
    from tests.benchmarks.peers.cases import Load

RANK = 32
"""Of all adapters: vLLM computes smaller ones as if they had the largest rank that it is told."""


def make() -> Any:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=sys.argv[1],
        dtype=worker.device()[1],
        enforce_eager=True,
        max_model_len=1024,
        enable_lora=True,
        max_loras=8,
        max_lora_rank=RANK,
        seed=0,
    )
    adapters: dict[int, Any] = {}

    def adapter(rank: int, tenant: int) -> Any:
        if tenant not in adapters:
            import peft
            import transformers

            base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
            config = peft.LoraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
            folder = tempfile.mkdtemp(prefix="bench-adapter-")
            peft.get_peft_model(base, config).save_pretrained(folder)
            adapters[tenant] = LoRARequest(str(tenant), tenant + 1, folder)
        return adapters[tenant]

    def sample(load: Load) -> None:
        given = [TokensPrompt(prompt_token_ids=prompt) for prompt in worker.prompts(load)]
        params = [
            SamplingParams(
                max_tokens=length, n=load.samples, ignore_eos=True, detokenize=False, logprobs=0
            )
            for length in load.lengths
        ]
        chosen = [adapter(load.rank, i % load.tenants) for i in range(len(given))]
        engine.generate(given, params, lora_request=chosen, use_tqdm=False)

    return sample


if __name__ == "__main__":
    worker.serve(make)
