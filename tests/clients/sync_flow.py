"""The whole flow of the published client, unmodified; run in its own environment.

`test_nex_weaver` starts it with WEAVER_BASE_URL and WEAVER_API_KEY set, in an empty folder. The
arguments are a transport of tensors, `default` or `http-binary`, and its compression.
"""

from __future__ import annotations

import json
import math
import sys

import torch

from weaver import ServiceClient, types

torch.set_num_threads(1)
transport, compression = sys.argv[1:]


def assert_alike(drawn, expected):
    """The same tokens; other tenants' samples beside them may move a number's last bits."""
    for one, other in zip(drawn["sequences"], expected["sequences"], strict=True):
        assert one["tokens"] == other["tokens"]
        assert torch.allclose(*(torch.tensor(s["logprobs"]) for s in (one, other)), atol=2e-5)


service = ServiceClient(tensor_transport=transport, tensor_compression=compression)
service.connect()
assert "weaver-nano" in service.list_supported_models()
trainer = service.create_model(
    base_model="weaver-nano:512", lora_config=types.LoraConfig(rank=8, seed=1)
)
tokenizer = trainer.get_tokenizer()
ids = tokenizer.encode("rev:hello=olleh")
n = len(ids) - 1
adam = types.AdamParams(learning_rate=1e-3)
limit = types.SamplingParams(max_tokens=8, seed=3)
prompt = types.ModelInput.from_ints(tokenizer.encode("rev:abc="))


def datum(**inputs):
    """`ids` with float inputs of shape [n]."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": torch.tensor(ids[1:]), **inputs},
    )


# cross_entropy, and the same gradient as a loss of the client's own
done = trainer.forward_backward([datum(weights=torch.ones(n))], "cross_entropy")
logprobs = torch.tensor(done["result"]["loss_fn_outputs"][0]["logprobs"])
assert logprobs.shape == (n,)
assert math.isclose(done["metrics"]["loss"], -logprobs.mean().item(), rel_tol=1e-5)
before = done["result"]["metrics"]["loss"]
norm = trainer.optim_step(adam)["metrics"]["grad_norm"]


def mean_nll(data, logprobs):
    return -logprobs[0].mean(), {"datums": len(data)}


fresh = service.create_model(base_model="weaver-nano", lora_config=types.LoraConfig(rank=8, seed=1))
custom = fresh.forward_backward_custom([datum(weights=torch.ones(n))], mean_nll)
assert math.isclose(custom["loss"].item(), before, rel_tol=1e-5)
assert math.isclose(fresh.optim_step(adam)["result"]["metrics"]["grad_norm"], norm, rel_tol=1e-4)

# importance_sampling, pipelined
rollout = datum(logprobs=logprobs, advantages=torch.ones(n), loss_mask=torch.ones(n))
config = {"entropy_coeff": 0.01, "temperature": 1.0}
handles = [
    trainer.forward_backward([rollout], "importance_sampling", loss_fn_config=config, wait=False),
    trainer.optim_step(adam, wait=False),
    trainer.forward([datum()], "cross_entropy", wait=False),
]
weighted, stepped, scored = [handle.result() for handle in handles]
assert weighted["metrics"]["ratio_mean"] > 0
assert stepped["metrics"]["step"] == 2
assert scored["metrics"]["loss"] < before

# samplers, samples, logprobs
sampler = trainer.save_weights_and_get_sampling_client(name="step-2")
sampled = sampler.sample(prompt=prompt, num_samples=4, sampling_params=limit)
assert len(sampled["sequences"]) == 4
for sequence in sampled["sequences"]:
    assert len(sequence["tokens"]) == len(sequence["logprobs"]) > 0
    assert sequence["text"] is not None
    assert sequence["stop_reason"] in ("stop", "length")
    assert sequence["weight_version"] == 2
again = sampler.sample(prompt=prompt, num_samples=4, sampling_params=limit)
assert_alike(again, sampled)
scores = sampler.compute_logprobs(prompt=types.ModelInput.from_ints(ids))
assert scores[0] is None
after = trainer.forward([datum()], "cross_entropy")["result"]["loss_fn_outputs"][0]["logprobs"]
assert torch.allclose(torch.tensor(scores[1:]), torch.tensor(after), atol=1e-4)
base = service.create_sampling_client(base_model="weaver-nano")
assert base.tokenizer_path == trainer.tokenizer_path
assert base.sample(prompt=prompt, sampling_params=limit)["sequences"]
path = trainer.save_weights_for_sampler(name="step-2", ttl_seconds=60)
exported = service.create_sampling_client(model_path=path, base_model="weaver-nano")
assert_alike(exported.sample(prompt=prompt, num_samples=4, sampling_params=limit), sampled)

# state
saved = trainer.save_state(name="two", checkpoint_type="weight_and_optimizer")
assert (saved.name, saved.status) == ("two", "completed")
trainer.forward_backward([datum()], "cross_entropy")
trainer.optim_step(adam)
moved = trainer.forward([datum()], "cross_entropy")["metrics"]["loss"]
assert not math.isclose(moved, scored["metrics"]["loss"], rel_tol=1e-4)
trainer.load_state(saved)
restored = trainer.forward([datum()], "cross_entropy")["metrics"]["loss"]
assert math.isclose(restored, scored["metrics"]["loss"], rel_tol=2e-5)
trainer.load_state_with_optimizer(saved.path)
assert saved.path in [checkpoint.path for checkpoint in trainer.list_checkpoints()]
trainer.set_checkpoint_ttl(saved, 3600)
assert {c.id: c.ttl_seconds for c in trainer.list_checkpoints()}[saved.id] == 3600

# artifacts
artifact = trainer.export_weights(checkpoint=saved)
folder = service.download_weights(artifact, "adapter")
assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
assert (folder / "adapter_model.safetensors").is_file()
trainer.export_weights(ttl_seconds=60)
whole = service.download_weights(trainer.export_weights(merge_adapter=True), "whole")
assert (whole / "model.safetensors").is_file() and (whole / "tokenizer.json").is_file()
assert not (whole / "adapter_config.json").exists()
assert service.download_weights(saved.path, "again", kind="hf_adapter").is_dir()

# what runs there are
trainer.log_metrics({"reward": 0.5}, step=2)
assert trainer.model_id in [model["id"] for model in service.list_models()["items"]]
run = service.get_training_run(trainer.model_id)
assert saved.id in [checkpoint["id"] for checkpoint in run["checkpoints"]]
assert service.get_model(trainer.model_id)["training_mode"] == "lora"

# refusals
for refused, code in (
    (lambda: service.create_model(base_model="gpt-9"), "unknown_model"),
    (lambda: service.list_organizations(), "unsupported"),
    (lambda: service.get_quota_balance(), "unsupported"),
    (lambda: trainer.load_state("weaver://nobody/checkpoints/x"), "checkpoint_not_found"),
    (lambda: trainer.forward([datum()], "no_such_loss"), "unknown_loss"),
    (lambda: trainer.optim_step(types.AdamParams()), "no_gradients"),
):
    try:
        refused()
    except Exception as error:
        assert getattr(error, "code", None) == code, error
    else:
        raise AssertionError(f"{code} was not raised")
service.close()
sys.stdout.write(f"{trainer.model_id} {saved.path}\n")
