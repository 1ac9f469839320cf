"""Bad inputs: each a named error that ends the wait, after which the run is as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import pytest

import weaver
from tests.client.helpers import DATUMS
from tests.fake_engine import FakeEngine
from weaver import Datum, ServiceClient, WeaverError, types
from weaver.client import opening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weaver import SamplingClient, TrainingClient

CONTEXT = 64
DEADLINE_S = 30
"""For what would otherwise hang; no case waits for anything."""
NAN = float("nan")


class World:
    """One service on the fake engine, with a run that has two checkpoints, and a sampler."""

    def __init__(self, service: ServiceClient) -> None:
        self.service = service
        self.trainer: TrainingClient = service.create_model("fake", {"rank": 4})
        self.trainer.forward_backward(DATUMS)
        self.trainer.optim_step({"learning_rate": 0.1}, wait=True)
        self.state = self.trainer.save_state("taken")
        self.of_other_model = service.create_model("other", {"rank": 4}).save_state()
        self.of_other_rank = service.create_model("fake", {"rank": 5}).save_state()
        self.corrupt = self.trainer.save_state("corrupt")
        self.sampler: SamplingClient = self.trainer.save_weights_and_get_sampling_client()
        for file in _files(self.corrupt.folder):
            file.write_bytes(b"\0")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            opening,
            "_torch_engine",
            lambda settings: FakeEngine(models=("fake", "other"), context_length=CONTEXT),
        )
        with ServiceClient(home=tmp_path_factory.mktemp("home")) as service:
            yield World(service)


def datum(tokens: object = (1, 2, 3), **inputs: object) -> Datum:
    return Datum(model_input=tokens, loss_fn_inputs={"target_tokens": [1] * len(tokens), **inputs})


def train(*datums: object, loss: str = "cross_entropy", **config: object) -> Callable[[World], Any]:
    return lambda w: w.trainer.forward_backward(
        list(datums), loss, loss_fn_config=config or None, wait=True
    )


def sample(prompt: object = "a", n: object = 1, **params: object) -> Callable[[World], Any]:
    return lambda w: w.sampler.sample(prompt, params, num_samples=n)


def create(base_model: object = "fake", **options: object) -> Callable[[World], Any]:
    return lambda w: w.service.create_model(base_model, **options)


def lora(**config: object) -> Callable[[World], Any]:
    return create(lora_config=config)


def step(**params: object) -> Callable[[World], Any]:
    return lambda w: w.trainer.optim_step(params, wait=True)


def trainer(verb: str, *args: object, **options: object) -> Callable[[World], Any]:
    return lambda w: getattr(w.trainer, verb)(*args, **options)


RATIO = {"logprobs": [-1.0] * 3, "advantages": [1.0] * 3}
USER = {"role": "user", "content": "hi"}
CASES: list[tuple[str, str, Callable[[World], Any]]] = [
    # data
    ("no datums", "invalid_datum", train()),
    ("not a list", "invalid_datum", trainer("forward_backward", DATUMS[0])),
    ("None", "invalid_datum", trainer("forward_backward", None)),
    ("not datums", "invalid_datum", train({"model_input": [1]})),
    ("an empty sequence", "invalid_datum", train(datum(()))),
    ("targets too short", "invalid_datum", train(datum(target_tokens=[1, 2]))),
    ("weights too long", "invalid_datum", train(datum(weights=[1.0] * 4))),
    ("two dimensions", "invalid_datum", train(datum(weights=[[1.0, 1.0, 1.0]]))),
    ("ragged", "invalid_datum", lambda w: datum(weights=[[1.0], [1.0, 2.0]])),
    ("a missing input", "invalid_datum", train(Datum(model_input=[1]))),
    ("a missing ratio input", "invalid_datum", train(datum(advantages=[1.0] * 3), loss="ppo")),
    ("an unknown input", "invalid_datum", train(datum(weight=[1.0] * 3))),
    ("an input of another loss", "invalid_datum", train(datum(**RATIO))),
    (
        "both names of the weights",
        "invalid_datum",
        train(datum(weights=[1] * 3, loss_mask=[1] * 3)),
    ),
    ("targets of floats", "invalid_datum", lambda w: datum(target_tokens=[1.0, 2.0, 3.0])),
    ("weights of text", "invalid_datum", lambda w: datum(weights=["a", "b", "c"])),
    ("weights of booleans", "invalid_datum", lambda w: datum(weights=np.array([True] * 3))),
    ("NaN weights", "invalid_datum", train(datum(weights=[1.0, NAN, 1.0]))),
    (
        "infinite logprobs",
        "invalid_datum",
        train(datum(**RATIO | {"logprobs": [-np.inf] * 3}), loss="ppo"),
    ),
    (
        "NaN advantages",
        "invalid_datum",
        train(datum(**RATIO | {"advantages": [NAN] * 3}), loss="dro"),
    ),
    ("a negative mean's weights", "invalid_datum", train(datum(weights=[-1.0] * 3))),
    ("a negative token", "invalid_datum", lambda w: datum((1, -2, 3))),
    ("a negative target", "token_out_of_range", train(datum(target_tokens=[1, -2, 3]))),
    ("a token out of the vocabulary", "token_out_of_range", train(datum((1, 257, 3)))),
    (
        "a target out of the vocabulary",
        "token_out_of_range",
        train(datum(target_tokens=[1, 999, 3])),
    ),
    ("tokens of floats", "invalid_datum", lambda w: Datum(model_input=[1.5, 2.0])),
    ("tokens of text", "invalid_datum", lambda w: Datum(model_input="abc")),
    ("longer than the context", "context_length_exceeded", train(datum([1] * (CONTEXT + 1)))),
    ("an unknown field of Datum", "invalid_datum", lambda w: Datum(model_inputs=[1])),
    # losses
    ("an unknown loss", "unknown_loss", train(datum(), loss="cross_entropie")),
    ("a loss that is no name", "unknown_loss", trainer("forward_backward", DATUMS, 3)),
    ("an unknown option", "invalid_loss_config", train(datum(), temprature=1.0)),
    ("an option of another loss", "invalid_loss_config", train(datum(), beta=0.1)),
    ("temperature 0", "invalid_loss_config", train(datum(), temperature=0)),
    ("a NaN option", "invalid_loss_config", train(datum(), temperature=NAN)),
    ("an option of text", "invalid_loss_config", train(datum(), temperature="1")),
    ("an unknown reduction", "invalid_loss_config", train(datum(), reduction="median")),
    ("a negative denominator", "invalid_loss_config", train(datum(), denominator=-1)),
    ("two reductions", "invalid_loss_config", train(datum(), denominator=1, reduction="sum")),
    (
        "crossed clips",
        "invalid_loss_config",
        train(datum(**RATIO), loss="ppo", clip_low_threshold=2),
    ),
    (
        "a config that is a list",
        "invalid_loss_config",
        trainer("forward", DATUMS, loss_fn_config=[1]),
    ),
    (
        "a custom loss that is a name",
        "invalid_request",
        trainer("forward_backward_custom", DATUMS, "ppo"),
    ),
    (
        "custom data without targets",
        "invalid_datum",
        trainer("forward_backward_custom", [Datum(model_input=[1])], max),
    ),
    # the optimizer
    ("an unknown optimizer field", "invalid_params", step(learning_rates=1.0)),
    ("a negative learning rate", "invalid_params", step(learning_rate=-1.0)),
    ("a NaN learning rate", "invalid_params", step(learning_rate=NAN)),
    ("beta1 of 1", "invalid_params", step(beta1=1.0)),
    ("eps of 0", "invalid_params", step(eps=0.0)),
    ("a negative clip norm", "invalid_params", step(grad_clip_norm=-1.0)),
    ("a number for AdamParams", "invalid_params", trainer("optim_step", 1e-4)),
    ("None for AdamParams", "invalid_params", trainer("optim_step", None)),
    (
        "SamplingParams for AdamParams",
        "invalid_params",
        trainer("optim_step", types.SamplingParams()),
    ),
    ("a step without a gradient", "no_gradients", step()),
    # models
    ("an unknown model", "unknown_model", create("fakee")),
    ("an empty model name", "invalid_request", create("")),
    ("a model name that is a number", "invalid_request", create(8)),
    ("rank 0", "invalid_params", lora(rank=0)),
    ("a huge rank", "invalid_params", lora(rank=1 << 20)),
    ("a rank of text", "invalid_params", lora(rank="many")),
    ("alpha 0", "invalid_params", lora(alpha=0)),
    ("an unknown LoRA field", "invalid_params", lora(ranks=8)),
    ("a LoRA config that is a number", "invalid_params", create(lora_config=8)),
    ("an unknown mode", "invalid_params", create(training_mode="qlora")),
    (
        "an adapter for full fine-tuning",
        "invalid_params",
        create(training_mode="full_ft", lora_config={}),
    ),
    ("a run that is not there", "run_not_found", lambda w: w.service.attach("nothing")),
    # sampling
    ("no tokens asked for", "invalid_params", sample(max_tokens=0)),
    ("a negative temperature", "invalid_params", sample(temperature=-0.1)),
    ("top_p 0", "invalid_params", sample(top_p=0.0)),
    ("top_p above 1", "invalid_params", sample(top_p=1.1)),
    ("top_k -2", "invalid_params", sample(top_k=-2)),
    ("min_p above 1", "invalid_params", sample(min_p=2.0)),
    ("repetition_penalty 0", "invalid_params", sample(repetition_penalty=0.0)),
    ("a presence_penalty of 2.1", "invalid_params", sample(presence_penalty=2.1)),
    ("a frequency_penalty of -3", "invalid_params", sample(frequency_penalty=-3)),
    ("a NaN frequency_penalty", "invalid_params", sample(frequency_penalty=NAN)),
    ("a bias of 101", "invalid_params", sample(logit_bias={1: 101})),
    ("a NaN bias", "invalid_params", sample(logit_bias={1: NAN})),
    ("a bias of no token", "invalid_params", sample(logit_bias={"a": 1})),
    ("a bias of a negative token", "invalid_params", sample(logit_bias={-1: 1})),
    ("two biases of a token", "invalid_params", sample(logit_bias={1: 1, "1": 2})),
    ("many biases", "invalid_params", sample(logit_bias=dict.fromkeys(range(1025), 0))),
    ("a number for biases", "invalid_params", sample(logit_bias=3)),
    (
        "a bias out of the vocabulary",
        "token_out_of_range",
        sample(max_tokens=3, logit_bias={257: 1}),
    ),
    ("an empty stop string", "invalid_params", sample(stop=[""])),
    ("stop of a number", "invalid_params", sample(stop=3)),
    ("a negative seed", "invalid_params", sample(seed=-1)),
    ("an unknown sampling field", "invalid_params", sample(max_token=3)),
    ("sampling_params that are a list", "invalid_params", lambda w: w.sampler.sample("a", [1])),
    ("no samples", "invalid_params", sample(n=0)),
    ("half a sample", "invalid_params", sample(n=1.5)),
    ("an empty prompt", "invalid_datum", sample([])),
    ("an empty text", "invalid_datum", sample("")),
    ("no prompt", "invalid_datum", sample(None)),
    ("a prompt of floats", "invalid_datum", sample([0.5])),
    ("a prompt of bytes", "invalid_datum", sample(b"abc")),
    ("one message alone", "invalid_datum", sample(USER)),
    ("a message without content", "invalid_params", sample([{"role": "user"}])),
    ("a message with an unknown field", "invalid_params", sample([USER | {"text": "hi"}])),
    ("an empty prompt among others", "invalid_datum", sample(["a", ""])),
    ("a negative prompt token", "invalid_datum", sample([-1])),
    ("a prompt token out of the vocabulary", "token_out_of_range", sample([257])),
    (
        "a prompt and tokens beyond the context",
        "context_length_exceeded",
        sample([1] * 60, max_tokens=5),
    ),
    ("a text beyond the context", "context_length_exceeded", sample("a" * 60, max_tokens=5)),
    (
        "logprobs beyond the context",
        "context_length_exceeded",
        lambda w: w.sampler.compute_logprobs([1] * 65),
    ),
    ("logprobs of nothing", "invalid_datum", lambda w: w.sampler.compute_logprobs([])),
    # checkpoints
    ("a name that climbs", "invalid_name", trainer("save_state", "../up")),
    ("a name with a slash", "invalid_name", trainer("save_state", "a/b")),
    ("an empty name", "invalid_name", trainer("save_state", "")),
    ("a long name", "invalid_name", trainer("save_weights_for_sampler", "a" * 200)),
    ("a name that is taken", "name_taken", trainer("save_state", "taken")),
    ("ttl 0", "invalid_params", trainer("save_state", ttl_seconds=0)),
    ("a ttl of text", "invalid_params", trainer("save_state", ttl_seconds="1h")),
    (
        "a checkpoint that is not there",
        "checkpoint_not_found",
        lambda w: w.trainer.load_state(f"weaver://{w.trainer.model_id}/weights/x", wait=True),
    ),
    ("a path of another form", "invalid_name", trainer("load_state", "weaver://a/b", wait=True)),
    (
        "a path that climbs",
        "invalid_name",
        trainer("load_state", "weaver://../weights/a", wait=True),
    ),
    ("a path that is a number", "invalid_name", trainer("load_state", 3)),
    (
        "a folder that is not there",
        "checkpoint_not_found",
        trainer("load_state", "/nowhere", wait=True),
    ),
    (
        "a checkpoint of another model",
        "checkpoint_mismatch",
        lambda w: w.trainer.load_state(w.of_other_model, wait=True),
    ),
    (
        "a checkpoint of another rank",
        "checkpoint_mismatch",
        lambda w: w.trainer.load_state(w.of_other_rank, wait=True),
    ),
    (
        "a corrupt checkpoint",
        "checkpoint_corrupt",
        lambda w: w.trainer.load_state(w.corrupt, wait=True),
    ),
    (
        "a corrupt sampler",
        "checkpoint_corrupt",
        lambda w: w.service.create_sampling_client(w.corrupt),
    ),
    ("a sampler of nothing", "invalid_request", lambda w: w.service.create_sampling_client()),
    (
        "a sampler that is not there",
        "checkpoint_not_found",
        lambda w: w.service.create_sampling_client("weaver://a/sampler/b"),
    ),
    (
        "a sampler of an unknown model",
        "unknown_model",
        lambda w: w.service.create_sampling_client(base_model="fak"),
    ),
    (
        "deleting what is not there",
        "checkpoint_not_found",
        lambda w: w.service.delete_checkpoint("weaver://a/weights/b"),
    ),
    (
        "the ttl of what is not there",
        "checkpoint_not_found",
        lambda w: w.service.set_checkpoint_ttl("weaver://a/weights/b", 3),
    ),
    # the rest
    ("a metric that is NaN", "invalid_params", trainer("log_metrics", {"a": NAN})),
    ("a metric of text", "invalid_params", trainer("log_metrics", {"a": "high"})),
    ("metrics that are a list", "invalid_request", trainer("log_metrics", [1])),
    (
        "a negative timeout",
        "invalid_params",
        lambda w: w.trainer.forward(DATUMS).result(timeout=-1),
    ),
    ("an address without a scheme", "invalid_params", lambda w: ServiceClient("localhost:1")),
]


async def answered(call: Callable[[World], Any], world: World) -> None:
    with anyio.fail_after(DEADLINE_S):
        await anyio.to_thread.run_sync(call, world, abandon_on_cancel=True)


@pytest.mark.parametrize(("code", "call"), [pytest.param(c, f, id=n) for n, c, f in CASES])
def test_bad_input(world: World, code: str, call: Callable[[World], Any]) -> None:
    before = world.trainer.forward(DATUMS, wait=True)
    step_before = world.trainer.get_info().step
    with pytest.raises(WeaverError) as caught:
        anyio.run(answered, call, world)
    assert caught.value.code == code, caught.value
    assert type(caught.value) is weaver.errors.CODES[code]
    assert str(caught.value)
    assert world.trainer.forward(DATUMS, wait=True) == before
    assert world.trainer.get_info().step == step_before
    if code != "no_gradients":
        # What was refused poisoned nothing: the same run still trains.
        world.trainer.forward_backward(DATUMS)
        world.trainer.optim_step({"learning_rate": 0.0}, wait=True)


def test_there_are_enough_of_them() -> None:
    assert len({name for name, _, _ in CASES}) == len(CASES) >= 60


def _files(folder: str | None) -> Iterator[Path]:
    from pathlib import Path

    assert folder is not None
    return (path for path in Path(folder).iterdir() if path.name != "manifest.json")
