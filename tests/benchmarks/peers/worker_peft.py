"""transformers and PEFT, in the loop that people write: `worker_peft.py FOLDER`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers import worker

if TYPE_CHECKING:
    from tests.benchmarks.peers.cases import Load

BATCH = 32
"""`generate` works on batches of so many, each as long as its longest row."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make() -> Any:
    import peft
    import torch
    import transformers

    transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    device, dtype = worker.device()
    base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).to(device)
    state: dict[str, Any] = {"model": None, "optimizers": {}}

    def model(load: Load) -> Any:
        """With the adapters of a load; those of another rank are made anew."""
        if state.get("rank") != load.rank or len(state["optimizers"]) < load.tenants:
            if state["model"] is not None:
                state["model"].unload()
            state["model"], state["rank"], state["optimizers"] = None, load.rank, {}
            config = peft.LoraConfig(
                r=load.rank, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"
            )
            for tenant in range(load.tenants):
                if state["model"] is None:
                    state["model"] = peft.get_peft_model(base, config, adapter_name="0")
                else:
                    state["model"].add_adapter(str(tenant), config)
                state["model"].set_adapter(str(tenant))
                trained = [p for p in state["model"].parameters() if p.requires_grad]
                state["optimizers"][tenant] = torch.optim.AdamW(trained, lr=1e-4)
        return state["model"]

    def train(load: Load) -> None:
        adapted = model(load).train()
        rows = worker.sequences(load)
        width = max(len(s) for s in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, s in enumerate(rows):
            first = worker.learned_from(load, len(s) - 1) + 1
            ids[row, : len(s)] = torch.tensor(s)
            mask[row, : len(s)] = 1
            labels[row, first : len(s)] = torch.tensor(s[first:])
        ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
        for tenant in range(load.tenants):
            adapted.set_adapter(str(tenant))
            adapted(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            state["optimizers"][tenant].step()
            state["optimizers"][tenant].zero_grad()

    def sample(load: Load) -> None:
        adapted = model(load).eval()
        given = list(zip(worker.prompts(load), load.lengths, strict=True))
        for start in range(0, len(given), BATCH):
            some = given[start : start + BATCH]
            ids = torch.tensor([prompt for prompt, _ in some], device=device)
            adapted.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(length for _, length in some),
                num_return_sequences=load.samples,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )

    def first_token(load: Load) -> None:
        ids = torch.tensor(worker.prompts(load), device=device)
        base.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0
        )

    rounds = {"train": train, "memory": train, "sample": sample, "first_token": first_token}
    return lambda load: rounds[load.kind](load)


if __name__ == "__main__":
    worker.serve(make)
