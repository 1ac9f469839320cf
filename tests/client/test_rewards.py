"""Reward models through the clients, embedded and on a server: scores, files, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest

from tests.server.test_kill import TORCH, running
from weaver import AsyncServiceClient, Datum, ServiceClient, errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weaver import TrainingClient

SIDES = [list(text.encode()) for text in ("good one", "bad one!", "a good", "a bad....")]
PAIRS = [Datum(model_input=side) for side in SIDES]
ADAM = {"learning_rate": 3e-3}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(home=tmp_path_factory.mktemp("home")) as service:
        yield service


@pytest.fixture(scope="module")
def trainer(service: ServiceClient) -> TrainingClient:
    """A reward model after three steps."""
    trainer = service.create_model("weaver-nano", {"rank": 4}, head="scalar", seed=3)
    for _ in range(3):
        trainer.forward_backward(PAIRS, "bradley_terry")
        trainer.optim_step(ADAM)
    return trainer


def test_scores_are_the_same_of_the_trainer_a_client_and_whatever_was_saved(
    service: ServiceClient, trainer: TrainingClient, tmp_path: Path
) -> None:
    scores = trainer.score(SIDES)
    assert scores[0] > scores[1] and scores[2] > scores[3]
    state, weights = trainer.save_state(), trainer.save_weights_for_sampler("weights")
    folder = service.export_checkpoint(weights, tmp_path / "adapter")
    found = service.import_checkpoint(folder, "weaver-nano")
    clients = [
        trainer.save_weights_and_get_reward_client(),
        service.create_reward_client(state),
        service.create_reward_client(weights.path),
        service.create_reward_client(found),
        service.create_reward_client(folder, "weaver-nano"),
    ]
    for client in clients:
        np.testing.assert_allclose(client.score(SIDES), scores, atol=1e-5)
        assert client.score(SIDES, wait=False).result() == client.score(SIDES)
    assert clients[0].weights_version == 3
    clients[0].close()
    with pytest.raises(errors.ClosedError):
        clients[0].score(SIDES)
    again = service.create_model(from_checkpoint=state, head="scalar", include_optimizer=True)
    np.testing.assert_allclose(again.score(SIDES), scores, atol=1e-6)
    assert again.head == "scalar"
    assert service.attach(again.model_id).head == "scalar"
    listed = {info.path: info for info in service.list_checkpoints(trainer.model_id)}
    lora = listed[state.path].lora_config
    assert lora is not None and lora.head == "scalar"


def test_a_loss_of_ones_own_is_of_the_scores(service: ServiceClient) -> None:
    def logistic(datums: Any, scores: Any) -> Any:
        assert [tuple(score.shape) for score in scores] == [(1,)] * len(PAIRS)
        apart = [scores[i] - scores[i + 1] for i in range(0, len(scores), 2)]
        return sum((-one.sigmoid().log()).sum() for one in apart) / len(apart), {"mine": 1.0}

    built_in, custom = (
        service.create_model("weaver-nano", {"rank": 4}, head="scalar", seed=5) for _ in range(2)
    )
    for _ in range(2):
        one = built_in.forward_backward(PAIRS, "bradley_terry", wait=True)
        other = custom.forward_backward_custom(PAIRS, logistic, wait=True)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        norms = [t.optim_step(ADAM, wait=True).metrics["grad_norm"] for t in (built_in, custom)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)


REFUSED: dict[str, tuple[Callable[[ServiceClient, TrainingClient], object], Any, str]] = {
    "sampling from it": (
        lambda service, trainer: trainer.save_weights_and_get_sampling_client(),
        errors.UnsupportedError,
        "reward model",
    ),
    "sampling from what it saved": (
        lambda service, trainer: service.create_sampling_client(trainer.save_state()),
        errors.UnsupportedError,
        "create_reward_client",
    ),
    "the log-probabilities of tokens": (
        lambda service, trainer: trainer.forward(PAIRS),
        errors.UnsupportedError,
        "bradley_terry",
    ),
    "scores of a model of tokens": (
        lambda service, trainer: service.create_model("weaver-nano").score(SIDES),
        errors.UnsupportedError,
        "scalar",
    ),
    "a reward client of a model of tokens": (
        lambda service, trainer: service.create_reward_client(
            service.create_model("weaver-nano", {"rank": 4}).save_state()
        ),
        errors.UnsupportedError,
        "scalar",
    ),
    "a head for a checkpoint without": (
        lambda service, trainer: service.create_model(
            from_checkpoint=service.create_model("weaver-nano", {"rank": 4}).save_state(),
            head="scalar",
        ),
        errors.CheckpointMismatchError,
        "without a scalar head",
    ),
    "loading one of tokens": (
        lambda service, trainer: trainer.load_state(
            service.create_model("weaver-nano", {"rank": 4}).save_state(), wait=True
        ),
        errors.CheckpointMismatchError,
        "head is None",
    ),
    "another head": (
        lambda service, trainer: service.create_model("weaver-nano", head="vector"),  # type: ignore[arg-type]
        errors.InvalidParamsError,
        "vector",
    ),
    "a head on all weights": (
        lambda service, trainer: service.create_model(
            "weaver-nano", head="scalar", training_mode="full_ft"
        ),
        errors.InvalidParamsError,
        "LoRA",
    ),
    "half a pair": (
        lambda service, trainer: trainer.forward_backward(PAIRS[:3], "bradley_terry"),
        errors.InvalidDatumError,
        "other side",
    ),
    "texts": (
        lambda service, trainer: trainer.score(["good"]),  # type: ignore[list-item]
        errors.InvalidDatumError,
        "get_tokenizer",
    ),
    "nothing": (
        lambda service, trainer: trainer.score([]),
        errors.InvalidDatumError,
        "tokens",
    ),
    "tokens that the model has not": (
        lambda service, trainer: trainer.score([[1, 2], [1, 9999]]),
        errors.TokenOutOfRangeError,
        r"prompts\[1\]",
    ),
    "what is too long": (
        lambda service, trainer: trainer.score([[1] * 2000]),
        errors.ContextLengthError,
        r"prompts\[0\]",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_by_name_changes_nothing(
    service: ServiceClient, trainer: TrainingClient, what: str
) -> None:
    before = trainer.score(SIDES)
    call, error, words = REFUSED[what]
    with pytest.raises(error, match=words) as caught:
        call(service, trainer)
    assert caught.value.field
    assert caught.value.hint
    assert trainer.score(SIDES) == before


def test_another_process_on_the_home_brings_it_back_by_its_journal(tmp_path: Path) -> None:
    with ServiceClient(home=tmp_path) as service:
        trainer = service.create_model("weaver-nano", {"rank": 4}, head="scalar")
        trainer.forward_backward(PAIRS, "bradley_terry")
        trainer.optim_step(ADAM)
        scores, run_id = trainer.score(SIDES), trainer.model_id
    with ServiceClient(home=tmp_path) as service:
        trainer = service.attach(run_id)
        assert trainer.head == "scalar"
        assert trainer.score(SIDES) == scores


async def rounds(service: AsyncServiceClient, restart: Callable[[], None]) -> list[object]:
    """What is seen of three steps; the server is to restart before the last and the scores."""
    seen: list[object] = []
    trainer = await service.create_model("weaver-nano", {"rank": 4}, head="scalar", seed=1)
    for step in range(3):
        gradient = trainer.forward_backward(PAIRS, "bradley_terry")
        seen.append(dict((await gradient).metrics))
        if step == 1:
            saved = await trainer.save_weights_for_sampler("saved")
            await anyio.to_thread.run_sync(restart)
        seen.append(dict((await trainer.optim_step(ADAM)).metrics))
    client = await service.create_reward_client(saved)
    seen += [await client.score(SIDES), await trainer.score(SIDES)]
    with pytest.raises(errors.UnsupportedError, match="reward model"):
        await service.create_sampling_client(saved)
    return seen


@pytest.mark.slow
def test_a_killed_server_goes_on_exactly_and_scores_as_before(tmp_path: Path) -> None:
    async def here() -> list[object]:
        async with AsyncServiceClient(home=tmp_path / "here", deterministic=True) as service:
            return await rounds(service, lambda: None)

    async def there() -> list[object]:
        with running(tmp_path / "there", TORCH) as server:
            async with AsyncServiceClient(server.url, api_key=server.keys[0]) as service:
                return await rounds(service, server.restart)

    assert anyio.run(there) == anyio.run(here)
