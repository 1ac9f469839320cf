"""Ours, through the public API, embedded: `worker_weaver.py FOLDER`."""

from __future__ import annotations

import sys
import time
from typing import Any

from tests.benchmarks.peers import worker
from tests.benchmarks.peers.cases import Load


def make() -> Any:
    from weaver import ServiceClient, types

    folder, service = sys.argv[1], ServiceClient()
    trainers: dict[tuple[int, int], Any] = {}
    samplers: dict[tuple[int, int], Any] = {}

    def trainer(rank: int, tenant: int = 0) -> Any:
        if (rank, tenant) not in trainers:
            config = {"rank": rank, "train_unembed": False}
            trainers[rank, tenant] = service.create_model(base_model=folder, lora_config=config)
        return trainers[rank, tenant]

    def sampler(rank: int, tenant: int) -> Any:
        if (rank, tenant) not in samplers:
            samplers[rank, tenant] = trainer(rank, tenant).save_weights_and_get_sampling_client()
        return samplers[rank, tenant]

    def datums(load: Load) -> list[types.Datum]:
        return [
            types.Datum(
                model_input=s[:-1],
                loss_fn_inputs={
                    "target_tokens": s[1:],
                    "weights": [
                        float(i >= worker.learned_from(load, len(s) - 1)) for i in range(len(s) - 1)
                    ],
                },
            )
            for s in worker.sequences(load)
        ]

    def train(load: Load) -> None:
        data, params = datums(load), types.AdamParams(learning_rate=1e-4)
        handles = []
        for tenant in range(load.tenants):
            one = trainer(load.rank, tenant)
            one.forward_backward(data, loss_fn="cross_entropy")
            handles.append(one.optim_step(params))
            if not load.merged:
                handles[-1].result()
        for handle in handles:
            handle.result()

    def sample(load: Load) -> None:
        handles = []
        for i, (prompt, length) in enumerate(zip(worker.prompts(load), load.lengths, strict=True)):
            params = types.SamplingParams(max_tokens=length, seed=i)
            one = sampler(load.rank, i % load.tenants)
            handles.append(
                one.sample(
                    prompt=types.ModelInput.from_ints(prompt),
                    num_samples=load.samples,
                    sampling_params=params,
                    wait=False,
                )
            )
        got = sum(len(s.tokens) for h in handles for s in h.result().sequences)
        assert got == load.tokens, (got, load.tokens)

    def grpo(load: Load) -> None:
        """16 samples of a prompt, advantages of a reward, a step, the new weights."""
        one = trainer(load.rank)
        client = one.save_weights_and_get_sampling_client()
        (prompt,), length = worker.prompts(load), load.lengths[0]
        reply = client.sample(
            prompt=types.ModelInput.from_ints(prompt),
            num_samples=load.samples,
            sampling_params=types.SamplingParams(max_tokens=length),
        )
        rewards = [float(len(set(s.tokens))) for s in reply.sequences]
        mean = sum(rewards) / len(rewards)
        data = []
        for sequence, reward in zip(reply.sequences, rewards, strict=True):
            whole, behind = [*prompt, *sequence.tokens], len(prompt) - 1
            fill = [0.0] * behind
            data.append(
                types.Datum(
                    model_input=whole[:-1],
                    loss_fn_inputs={
                        "target_tokens": whole[1:],
                        "logprobs": [*fill, *sequence.logprobs],
                        "advantages": [*fill, *[reward - mean] * len(sequence.tokens)],
                        "weights": [*fill, *[1.0] * len(sequence.tokens)],
                    },
                )
            )
        one.forward_backward(data, loss_fn="importance_sampling")
        one.optim_step(types.AdamParams(learning_rate=1e-5), wait=True)

    def publish(load: Load) -> float:
        """Seconds from a step to a client of the new weights."""
        one = trainer(load.rank)
        train(Load(kind="train", lengths=(8,), rank=load.rank))
        began = time.perf_counter()
        one.save_weights_and_get_sampling_client()
        return time.perf_counter() - began

    def first_token(load: Load) -> None:
        (prompt,) = worker.prompts(load)
        client = service.create_sampling_client(base_model=folder)
        params = types.SamplingParams(max_tokens=1)
        client.sample(prompt=types.ModelInput.from_ints(prompt), sampling_params=params)

    def first_step(load: Load) -> None:
        train(Load(kind="train", lengths=(64, 64)))

    rounds = {
        "train": train,
        "memory": train,
        "sample": sample,
        "first_token": first_token,
        "grpo": grpo,
        "publish": publish,
        "first_step": first_step,
    }
    return lambda load: rounds[load.kind](load)


if __name__ == "__main__":
    worker.serve(make)
