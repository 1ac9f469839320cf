"""The clients on the embedded torch engine: what the fake engine cannot show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.optional import peft
from weaver import Datum, ServiceClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(home=tmp_path_factory.mktemp("home")) as service:
        yield service


def ratio_batch() -> list[Datum]:
    return [
        Datum(
            model_input=list(range(10, 10 + length)),
            loss_fn_inputs={
                "target_tokens": list(range(11, 11 + length)),
                "logprobs": [-3.0 - 0.1 * i for i in range(length)],
                "advantages": [(-1.0) ** i for i in range(length)],
            },
        )
        for length in (5, 9)
    ]


def ppo(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Schulman et al., arXiv:1707.06347, equation 7, as the engine has it: a mean over tokens."""
    total, count = logprobs[0].new_zeros(()), 0
    for datum, lp in zip(datums, logprobs, strict=True):
        ratio = (lp - datum.loss_fn_inputs["logprobs"].to_torch()).exp()
        advantage = datum.loss_fn_inputs["advantages"].to_torch()
        total = total - (ratio * advantage).minimum(ratio.clamp(0.8, 1.2) * advantage).sum()
        count += len(lp)
    return total / count, {}


def test_a_custom_loss_equals_the_built_in_one(service: ServiceClient) -> None:
    built_in, custom = (service.create_model("weaver-nano", {"rank": 4}) for _ in range(2))
    for _ in range(3):
        one = built_in.forward_backward(ratio_batch(), "ppo", wait=True)
        other = custom.forward_backward_custom(ratio_batch(), ppo, wait=True)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        step, its_step = (t.optim_step({"learning_rate": 1e-3}) for t in (built_in, custom))
        assert its_step.result().metrics["grad_norm"] == pytest.approx(
            step.result().metrics["grad_norm"], rel=1e-4
        )


def test_a_state_goes_on_where_it_was_saved(service: ServiceClient) -> None:
    def train(trainer: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(trainer.forward_backward(ratio_batch(), "ppo", wait=True))
            trainer.optim_step({"learning_rate": 1e-3}, wait=True)
        return [loss.metrics["loss"] for loss in losses]

    trainer = service.create_model("weaver-nano", {"rank": 4})
    train(trainer, 2)
    saved = trainer.save_state("middle")
    straight = train(trainer, 2)
    other = service.create_model("weaver-nano", {"rank": 4}, seed=7)
    other.load_state_with_optimizer(saved)
    assert train(other, 2) == straight


def test_engine_and_client_read_a_tokenizer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    read, load = [], AutoTokenizer.from_pretrained

    def counted(source: object, **options: Any) -> Any:
        read.append(source)
        return load(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    with ServiceClient(home=tmp_path) as service:
        client = service.create_sampling_client(base_model="weaver-nano")
        client.sample("Hi", sampling_params={"max_tokens": 1}, num_samples=1)
        tokenizer = client.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("Hi", add_special_tokens=False)) == "Hi"
        service.create_sampling_client(base_model="weaver-nano").get_tokenizer()
    assert len(read) == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_exports_answer_as_the_run_does(service: ServiceClient, tmp_path: Path) -> None:
    import torch
    import transformers

    trainer = service.create_model("weaver-nano", {"rank": 4, "train_unembed": True})
    for _ in range(5):
        trainer.forward_backward(ratio_batch(), "ppo")
        trainer.optim_step({"learning_rate": 1e-2}, wait=True)
    state = trainer.save_state("to-export")
    [tokens] = [list(range(10, 40))]
    wanted = trainer.save_weights_and_get_sampling_client().compute_logprobs(tokens)
    service.export_checkpoint(state, tmp_path / "adapter")
    service.export_checkpoint(state, tmp_path / "merged", merge=True)
    for loaded in (  # as they are: the adapter says where its base is
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(),
    ):
        with torch.no_grad():
            logprobs = loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)
        got = [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
        assert got == pytest.approx(wanted[1:], abs=5e-5)
    base = service.create_sampling_client(base_model="weaver-nano").compute_logprobs(tokens)
    assert got != pytest.approx(base[1:], abs=1e-2)
