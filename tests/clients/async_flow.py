"""The published client's async half, unmodified; run in its own environment."""

from __future__ import annotations

import asyncio

import torch

from weaver import AsyncServiceClient, types

torch.set_num_threads(1)


def mean_nll(data, logprobs):
    return -torch.cat(logprobs).mean(), {}


async def main() -> None:
    async with AsyncServiceClient() as service:
        trainer = await service.create_model(
            base_model="weaver-nano", lora_config=types.LoraConfig(rank=8)
        )
        ids = trainer.get_tokenizer().encode("rev:hello=olleh")
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={"target_tokens": torch.tensor(ids[1:])},
        )
        adam = types.AdamParams(learning_rate=1e-3)
        losses = []
        for _ in range(3):
            backward = await trainer.forward_backward([datum], "cross_entropy", wait=False)
            step = await trainer.optim_step(adam, wait=False)
            losses.append((await backward.result())["metrics"]["loss"])
            await step.result()
        assert losses[2] < losses[0], losses
        await trainer.forward_backward_custom([datum], mean_nll)
        # sent at once, over connections of their own: they must not overtake each other
        _, last = await asyncio.gather(
            trainer.forward_backward([datum] * 64, "cross_entropy"), trainer.optim_step(adam)
        )
        assert last["metrics"]["step"] == 4
        sampler = await trainer.save_weights_and_get_sampling_client(name="async")
        prompt = types.ModelInput.from_ints(ids[:9])
        params = types.SamplingParams(max_tokens=4)
        replies = await asyncio.gather(
            *(
                sampler.sample(prompt=prompt, num_samples=4, sampling_params=params)
                for _ in range(32)
            )
        )
        assert all(len(reply["sequences"]) == 4 for reply in replies)
        assert len(await sampler.compute_logprobs(prompt=prompt)) == 9
        saved = await trainer.save_state(name="async")
        await trainer.load_state(saved)
        artifact = await trainer.export_weights(checkpoint=saved)
        folder = await service.download_weights(artifact, "adapter")
        assert (folder / "adapter_model.safetensors").is_file()


asyncio.run(main())
