"""Unknown keywords get the nearest known one, and objects say what they are."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

import weaver
import weaver_rl as rl
from weaver import AsyncServiceClient, ServiceClient, types
from weaver.errors import InvalidDatumError, InvalidParamsError, InvalidRequestError
from weaver.keywords import UnknownKeywordError, suggesting


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceClient:
    return ServiceClient(home=tmp_path_factory.mktemp("home"))


def test_what_is_called_says_what_was_meant(service: ServiceClient) -> None:
    trainer = service.create_model("weaver-nano", {"rank": 4})
    sampler = service.create_sampling_client(base_model="weaver-nano")
    said: list[tuple[Callable[..., object], dict[str, object], str]] = [
        (service.create_model, {"lora": {}}, "ServiceClient.create_model() got an "
         "unexpected keyword argument 'lora'. Did you mean 'lora_config'?"),
        (trainer.forward_backward, {"datum": []}, "Did you mean 'datums'?"),
        (trainer.optim_step, {"zzz": 1}, "Known: adam_params."),
        (sampler.sample, {"prompt": "a", "n": 2}, "Did you mean 'num_samples'?"),
        (rl.Plan, {"lr": 1}, "Did you mean 'learning_rate'?"),
        (rl.Objective, {"loss": "ppo"}, "Did you mean 'loss_fn'?"),
        (rl.train, {"learningrate": 1}, "Did you mean 'learning_rate'?"),
        (rl.fine_tune, {"lr": 1}, "Did you mean 'learning_rate'?"),
        (rl.judge, {"questions": "?"}, "Did you mean 'question'?"),
        (ServiceClient, {"uri": "http://server"}, "ServiceClient.__init__() got"),
    ]  # fmt: skip
    for function, keywords, words in said:
        with pytest.raises(UnknownKeywordError) as refused:
            function(**keywords)
        assert words in str(refused.value) and "Async" not in str(refused.value)
    with pytest.raises(InvalidParamsError, match="Did you mean 'learning_rate'"):
        trainer.optim_step({"lr": 1e-3})


GIVEN = {
    (module, name): value
    for module in (weaver, rl, rl.credit, rl.curriculum, rl.schedules)
    for name in getattr(module, "__all__", dir(module))
    if callable(value := getattr(module, name))
    and not name.startswith("_")
    and str(getattr(value, "__module__", "")).startswith("weaver")
}
"""Whatever can be called by users."""
UNASKED = ("Handle", "OperationHandle", *(f"{m}{n}Client" for m in ("", "Async") for n in
           ("Training", "Sampling", "Reward")))  # fmt: skip
"""Of these a service client makes them."""


def takes_keywords(value: Callable[..., object]) -> bool:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return False
    kinds = {one.kind for one in inspect.signature(value).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD not in kinds and len(kinds) > 0


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(value, id=f"{module.__name__}.{name}")
        for (module, name), value in GIVEN.items()
        if name not in UNASKED and not getattr(value, "_is_protocol", False)
        and takes_keywords(value)
    ],
)  # fmt: skip
def test_all_that_is_called_knows_its_keywords(value: Callable[..., object]) -> None:
    async def call() -> None:
        made = value(zzz=1)
        if inspect.isawaitable(made):
            await made

    with pytest.raises((UnknownKeywordError, InvalidRequestError), match=r"Known|zzz: .* no such"):
        anyio.run(call)
    if inspect.isfunction(value):
        assert pickle.loads(pickle.dumps(value)) is value  # as functions of rewards' processes are


def test_an_unknown_field_is_told_before_one_that_is_missing() -> None:
    with pytest.raises(InvalidDatumError, match="Did you mean 'model_input'"):
        types.Datum(model_inputs=[1])  # type: ignore[call-arg]


def test_what_is_wrong_inside_is_not_explained_away() -> None:
    def inner(*, known: int) -> int:
        return known

    @suggesting
    def outer(**given: int) -> int:
        return inner(**given)

    assert outer(known=3) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'knwon'") as refused:
        outer(knwon=3)
    assert not isinstance(refused.value, UnknownKeywordError)
    with pytest.raises(TypeError, match="positional"):
        suggesting(inner)(3)

    @suggesting
    def fails_twice() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            len(5)  # type: ignore[arg-type]

    with pytest.raises(TypeError) as both:
        fails_twice()
    assert isinstance(both.value.__context__, KeyError) and not both.value.__suppress_context__


def test_signatures_stay() -> None:
    plan = rl.Plan(steps=1)
    assert replace(plan, steps=2).steps == 2
    assert "learning_rate" in inspect.signature(rl.Plan).parameters
    assert inspect.iscoroutinefunction(AsyncServiceClient.list_training_runs)


def test_objects_say_what_they_are(service: ServiceClient, tmp_path: Path) -> None:
    trainer = service.create_model("weaver-nano", {"rank": 4})
    sampler = trainer.save_weights_and_get_sampling_client(name="best")
    assert repr(service).startswith("<ServiceClient: embedded, below ")
    assert repr(trainer) == f"<TrainingClient: {trainer.model_id} of weaver-nano>"
    of = f"weaver://{trainer.model_id}/sampler/best of weaver-nano, step 0"
    assert repr(sampler) == f"<SamplingClient: {of}>"
    assert repr(AsyncServiceClient("http://server:1")) == "<AsyncServiceClient: http://server:1>"
    for client in (sampler, service.create_sampling_client(base_model="weaver-nano")):
        shown = client._repr_html_()
        assert "<td>base_model</td><td><pre>weaver-nano</pre></td>" in shown and "open" in shown
    sampler.close()
    assert "<pre>closed</pre>" in sampler._repr_html_()
    [run] = [run for run in service.list_training_runs() if run.run_id == trainer.model_id]
    assert f"<td><pre>{trainer.model_id}</pre></td>" in run._repr_html_()
    sequence = types.SampledSequence(
        tokens=(1,), text="<script>", logprobs=(0.0,), sampling_logprobs=(0.0,),
        stop_reason="stop", weights_version=0,
    )  # fmt: skip
    shown = types.SampleResult(sequences=(sequence,))._repr_html_()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "stop_reason" in shown
