"""A program for the published `tinker` package, as its users write them; run by test_tinker.py."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import tarfile
import urllib.request

import numpy as np
import tinker
import torch
from tinker import types

MODEL = "weaver-nano"
TOKENS, TARGETS = [5, 6, 7, 8], [6, 7, 8, 9]
PROMPT = types.ModelInput.from_ints(TOKENS[:3])
RATIO_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")


def datum(**inputs: list[float]) -> types.Datum:
    given = {"target_tokens": TARGETS, **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs=given)


def now(future):  # type: ignore[no-untyped-def]
    """Some methods answered results where later releases answer futures."""
    return future.result() if hasattr(future, "result") else future


def places(trainer, sampler) -> None:  # type: ignore[no-untyped-def]
    """Likeliest tokens and targets of a prompt; then these as what a student is trained on."""
    asked = inspect.signature(sampler.sample).parameters
    given = {"topk_prompt_logprobs": 4}
    prompt = types.ModelInput.from_ints([*TOKENS, 9])
    if "target_prompt_logprobs" in asked:
        targets = torch.full((4, 8), -1)  # so many are sent in sparse rows
        targets[[0, 2, 3], 0], targets[2, 1] = torch.tensor([6, 8, 9]), 3
        given["target_prompt_logprobs"] = types.TensorData.from_torch_sparse(targets, pad_value=-1)
        given["topk_sample_logprobs"] = 3
    params = types.SamplingParams(max_tokens=3, seed=1, temperature=0.5)
    told = sampler.sample(
        prompt, num_samples=1, sampling_params=params, include_prompt_logprobs=True, **given
    ).result()
    top = told.topk_prompt_logprobs
    assert top[0] is None and [len(row) for row in top[1:]] == [4] * 4
    if "target_prompt_logprobs" in asked:
        found = told.target_prompt_logprobs.to_torch()
        assert told.target_prompt_logprobs.sparse_crow_indices == [0, 1, 1, 3, 4]
        assert found.shape == (4, 8) and found[1].tolist() == [0] * 8 and found[2, 1] < 0
        assert np.allclose(found[[0, 2, 3], 0], [told.prompt_logprobs[i] for i in (1, 3, 4)])
        (sequence,) = told.sequences
        for token, lp, row in zip(
            sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True
        ):
            likeliest = dict(row)
            assert math.isclose(likeliest.get(token, lp), lp, abs_tol=1e-4)
            assert sum(map(math.exp, likeliest.values())) < 1.001
    tokens, weights = torch.zeros((4, 12), dtype=torch.int64), torch.zeros((4, 12))
    tokens[:, :4] = torch.tensor([[t for t, _ in row] for row in top[1:]])
    weights[1:, :4] = torch.tensor([[lp for _, lp in row] for row in top[2:]]).exp()
    soft = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS),
        loss_fn_inputs={"target_tokens": tokens, "weights": weights},
    )
    passed = trainer.forward([soft, datum(weights=[0.0, 0.0, 0.0, 0.0])], "cross_entropy").result()
    lp, flat = (one["logprobs"].to_torch() for one in passed.loss_fn_outputs)
    assert lp.shape == (4, 12) and flat.shape == (4,)
    loss = float(-(lp * weights).sum())
    assert math.isclose(passed.metrics["loss:sum"], loss, rel_tol=1e-4), (passed.metrics, loss)

    def own(_, logprobs):  # type: ignore[no-untyped-def]
        value = -(logprobs[0] * weights).sum()
        return value, {"mine": float(value)}

    custom = now(trainer.forward_backward_custom([soft], own)).metrics
    assert math.isclose(custom["mine"], loss, rel_tol=1e-4), (custom, loss)
    trainer.optim_step(types.AdamParams(learning_rate=0.0)).result()


def main() -> None:
    service = tinker.ServiceClient(
        base_url=os.environ["TINKER_BASE_URL"], api_key=os.environ["TINKER_API_KEY"]
    )
    trainer = now(service.create_lora_training_client(base_model=MODEL, rank=8, seed=1))
    info = now(trainer.get_info())
    assert (info.model_data.model_name, info.lora_rank) == (MODEL, 8)
    supervised = [datum(weights=[0.0, 1.0, 1.0, 1.0])] * 3

    losses = []
    for _ in range(6):
        passed = trainer.forward_backward(supervised, "cross_entropy")
        stepped = trainer.optim_step(types.AdamParams(learning_rate=3e-3))
        losses.append(passed.result().metrics["loss:sum"])
        assert stepped.result().metrics["grad_norm"] > 0
    assert losses[-1] < 0.7 * losses[0], losses
    output = trainer.forward(supervised, "cross_entropy").result()
    lp = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert math.isclose(output.metrics["loss:sum"], -3 * float(lp[1:].sum()), rel_tol=1e-4)

    q, advantages = (lp - 0.1).tolist(), [0.0, 1.0, -1.0, 1.0]
    ratio = math.exp(0.1)
    for loss_fn in RATIO_LOSSES:
        inputs = {"logprobs": q, "advantages": advantages}
        try:
            if loss_fn == "gspo":
                inputs["sequence_ratio_mask"] = [0.0, 1.0, 1.0, 1.0]
            given = [datum(**inputs)]
        except KeyError:
            continue  # a release that has no such loss
        metrics = trainer.forward_backward(given, loss_fn).result().metrics
        if loss_fn in ("importance_sampling", "ppo"):
            assert math.isclose(metrics["loss:sum"], -ratio, rel_tol=1e-3), metrics
        assert math.isfinite(metrics["loss:sum"])
    trainer.optim_step(types.AdamParams(learning_rate=0.0)).result()

    def own(_, logprobs):  # type: ignore[no-untyped-def]
        loss = -sum(one.sum() for one in logprobs)
        return loss, {"mine": float(loss)}

    custom = now(trainer.forward_backward_custom(supervised, own)).metrics
    assert math.isclose(custom["mine"], -3 * float(lp.sum()), rel_tol=1e-3), custom
    trainer.optim_step(types.AdamParams(learning_rate=1e-3)).result()

    state = now(trainer.save_state("first")).path
    named = now(trainer.save_weights_for_sampler("first")).path
    parameters = inspect.signature(trainer.save_weights_and_get_sampling_client).parameters
    sampler = now(
        trainer.save_weights_and_get_sampling_client(*(["x"] if "name" in parameters else []))
    )
    params = types.SamplingParams(max_tokens=8, seed=1, temperature=1.0)
    reply = sampler.sample(PROMPT, num_samples=2, sampling_params=params).result()
    again = sampler.sample(PROMPT, num_samples=2, sampling_params=params).result()
    assert [s.tokens for s in reply.sequences] == [s.tokens for s in again.sequences]
    for sequence in reply.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs)
    scored = sampler.compute_logprobs(types.ModelInput.from_ints([*TOKENS, 9])).result()
    now_lp = trainer.forward(supervised, "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert scored[0] is None
    assert np.allclose(scored[1:], now_lp.to_numpy(), atol=1e-4), (scored, now_lp)
    places(trainer, sampler)
    other = now(service.create_sampling_client(model_path=named))
    same = other.sample(PROMPT, num_samples=2, sampling_params=params).result()
    assert [s.tokens for s in same.sequences] == [s.tokens for s in reply.sequences]
    base = now(service.create_sampling_client(base_model=MODEL))
    assert base.compute_logprobs(PROMPT).result()[1:] != scored[1:3]

    resumed = now(service.create_training_client_from_state(state))
    loss = resumed.forward(supervised, "cross_entropy").result().metrics["loss:sum"]
    before = trainer.forward(supervised, "cross_entropy").result().metrics["loss:sum"]
    assert math.isclose(loss, before, rel_tol=1e-5)
    if hasattr(service, "create_training_client_from_state_with_optimizer"):
        resumed = now(service.create_training_client_from_state_with_optimizer(state))
        resumed.forward_backward(supervised, "cross_entropy").result()
        assert resumed.optim_step(types.AdamParams()).result().metrics["step"] == 9.0

    rest = service.create_rest_client()
    runs = now(rest.list_training_runs()).training_runs
    assert trainer.model_id in {run.training_run_id for run in runs}
    kept = now(rest.list_checkpoints(trainer.model_id)).checkpoints
    assert {one.tinker_path for one in kept} == {state, named}
    assert now(rest.get_weights_info_by_tinker_path(state)).lora_rank == 8

    if hasattr(rest, "get_checkpoint_archive_url_from_tinker_path"):
        url = now(rest.get_checkpoint_archive_url_from_tinker_path(named)).url
        with urllib.request.urlopen(url) as reply, tarfile.open(fileobj=reply, mode="r|") as tar:
            got = {member.name: tar.extractfile(member).read() for member in tar}
    else:
        path = now(trainer.save_weights_external("out")).path
        urls = now(rest.get_external_weights_urls(path)).urls
        got = {name: urllib.request.urlopen(url).read() for name, url in urls.items()}
    assert json.loads(got["adapter_config.json"])["r"] == 8
    assert "adapter_model.safetensors" in got and "optimizer.safetensors" not in got

    for wrong in (lambda: now(service.create_lora_training_client(base_model="none")).get_info(),):
        try:
            wrong()
        except Exception as error:
            assert "none" in str(error), error
        else:
            raise AssertionError("a model that is not there was made")
    told = {"version": tinker.__version__, "model_id": trainer.model_id, "losses": losses}
    sys.stdout.write(f"{json.dumps(told)}\n")


if __name__ == "__main__":
    main()
