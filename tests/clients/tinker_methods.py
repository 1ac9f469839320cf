"""What becomes of every public method of the published `tinker` package, in its own environment.

Calls each at the server in the environment, and each `_async` twin, and prints the table of
docs/tinker.md. A method that is not in `CALLS` ends it: none is left out.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import urllib.request
import uuid
import warnings
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tinker
from tinker import types
from tinker.types import SessionSearchRequest

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "weaver-nano"
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
PROMPT = types.ModelInput.from_ints([5, 6, 7])
DATA = [
    types.Datum(
        model_input=PROMPT,
        loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 1.0]},
    )
]
ADAM = types.AdamParams(learning_rate=1e-4)
SAMPLING = types.SamplingParams(max_tokens=4, seed=1)
NOTES = {
    "ServiceClient.create_lora_training_client": "a model that the server has; alpha is 32; `name` "
    "in `user_metadata` is the run's [name](concepts.md#names)",
    "ServiceClient.create_custom_loss": "the client computes it, under the same constraints",
    "TrainingClient.forward_backward_custom": "the client computes the loss",
    "TrainingClient.optim_step": "without a gradient it changes nothing: `skipped:sum`",
    "TrainingClient.save_weights_external": (
        "PEFT's layout, without the optimizer; natively called `external-<name>`; not encrypted"
    ),
    "TrainingClient.save_weights_and_get_sampling_client": "a session keeps the newest 64",
    "RestClient.get_external_weights_urls": "they need no key, for 15 minutes",
    "RestClient.list_sessions": "those that are open",
    "SamplingClient.get_tokenizer": "by the base model's name: of the hub, or of a folder here",
}
"""What a user should know of a method that works as its description says."""
PAGE = "names a page of Tinker's; this server has its own at its address"
UNKEPT = "`user_metadata` of a checkpoint is not kept"
DIFFERS = {
    "ServiceClient.get_console_url": PAGE,
    "TrainingClient.get_console_url": PAGE,
    "TrainingClient.load_state": "at any time, where Tinker takes it as a model's first request",
    "TrainingClient.load_state_with_optimizer": "the same",
    "TrainingClient.save_state": UNKEPT,
    "TrainingClient.save_weights_for_sampler": UNKEPT,
    "RestClient.list_training_runs": "of the key's project, by any client; no `access_scope`",
    "RestClient.get_current_checkpoint_storage_usage": "of the key's projects; no prices",
    "AdminClient.get_current_checkpoint_storage_usage": "of the key's projects; no prices",
}
"""What is otherwise than its description says."""


@dataclass(frozen=True)
class World:
    """Clients of each class, and checkpoints, of one session."""

    ServiceClient: Any = field(default_factory=lambda: tinker.ServiceClient(project_id="p"))

    @cached_property
    def TrainingClient(self) -> Any:
        return settled(self.ServiceClient.create_lora_training_client(MODEL, rank=4, seed=1))

    @cached_property
    def SamplingClient(self) -> Any:
        return settled(self.ServiceClient.create_sampling_client(base_model=MODEL))

    @cached_property
    def RestClient(self) -> Any:
        return self.ServiceClient.create_rest_client()

    @cached_property
    def AdminClient(self) -> Any:
        return tinker.AdminClient()

    @property
    def run(self) -> str:
        return str(self.TrainingClient.model_id)

    def state(self) -> str:
        """A checkpoint of its own."""
        return str(settled(self.TrainingClient.save_state(name())).path)

    def sampler(self) -> str:
        return str(settled(self.TrainingClient.save_weights_for_sampler(name())).path)

    def external(self) -> str:
        return str(settled(self.TrainingClient.save_weights_external(name())).path)

    def gradient(self) -> None:
        settled(self.TrainingClient.forward_backward(DATA, "cross_entropy"))


def name() -> str:
    return uuid.uuid4().hex[:12]


def own_loss(_: Any, logprobs: Any) -> Any:
    loss = -sum(one.sum() for one in logprobs)
    return loss, {"mine": float(loss)}


def traced_loss(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss}


def downloaded(urls: Any) -> bool:
    with urllib.request.urlopen(urls.urls["adapter_config.json"]) as reply:
        return b"target_modules" in reply.read()


CALLS: dict[str, tuple[Callable[[Any, World], Any], Callable[[Any], Any]]] = {
    "ServiceClient.get_console_url": (lambda m, w: m(), lambda r: r.startswith("http")),
    "ServiceClient.get_server_capabilities": (
        lambda m, w: m(),
        lambda r: MODEL in {one.model_name for one in r.supported_models},
    ),
    "ServiceClient.create_lora_training_client": (
        lambda m, w: m(MODEL, rank=4),
        lambda r: settled(r.get_info()).lora_rank == 4,
    ),
    "ServiceClient.copy_weights": (lambda m, w: m(w.state()), bool),
    "ServiceClient.create_training_client_from_state": (
        lambda m, w: m(w.state()),
        lambda r: settled(r.get_info()).lora_rank == 4,
    ),
    "ServiceClient.create_training_client_from_state_with_optimizer": (
        lambda m, w: m(w.state()),
        lambda r: settled(r.get_info()).lora_rank == 4,
    ),
    "ServiceClient.create_sampling_client": (
        lambda m, w: m(model_path=w.sampler()),
        lambda r: len(settled(r.sample(PROMPT, 1, SAMPLING)).sequences) == 1,
    ),
    "ServiceClient.create_custom_loss": (
        lambda m, w: m(traced_loss, {"logprobs": 1, "weights": 1}),
        bool,
    ),
    "ServiceClient.create_rest_client": (lambda m, w: m(), bool),
    "ServiceClient.close": (lambda m, w: closing(m), lambda r: r is None),
    "ServiceClient.get_telemetry": (lambda m, w: m(), lambda r: True),
    "TrainingClient.get_console_url": (lambda m, w: m(), lambda r: r.startswith("http")),
    "TrainingClient.forward": (
        lambda m, w: m(DATA, "cross_entropy"),
        lambda r: len(r.loss_fn_outputs[0]["logprobs"].data) == 3,
    ),
    "TrainingClient.forward_backward": (
        lambda m, w: m(DATA, "cross_entropy"),
        lambda r: r.metrics["loss:sum"] > 0,
    ),
    "TrainingClient.forward_backward_custom": (
        lambda m, w: m(DATA, own_loss),
        lambda r: r.metrics["mine"] > 0,
    ),
    "TrainingClient.optim_step": (
        lambda m, w: (w.gradient(), m(ADAM))[1],
        lambda r: r.metrics["grad_norm"] > 0,
    ),
    "TrainingClient.save_state": (
        lambda m, w: m(name(), ttl_seconds=3600),
        lambda r: "/weights/" in r.path,
    ),
    "TrainingClient.load_state": (lambda m, w: m(w.state()), lambda r: r.path),
    "TrainingClient.load_state_with_optimizer": (lambda m, w: m(w.state()), lambda r: r.path),
    "TrainingClient.save_weights_for_sampler": (
        lambda m, w: m(name()),
        lambda r: "/sampler_weights/" in r.path,
    ),
    "TrainingClient.save_weights_external": (
        lambda m, w: m(name(), ttl_seconds=3600),
        lambda r: "/external_weights/" in r.path,
    ),
    "TrainingClient.get_info": (
        lambda m, w: m(),
        lambda r: r.model_data.model_name == MODEL,
    ),
    "TrainingClient.get_tokenizer": (lambda m, w: m(), lambda r: r.encode("ab")),
    "TrainingClient.create_sampling_client": (
        lambda m, w: m(w.sampler()),
        lambda r: len(settled(r.sample(PROMPT, 1, SAMPLING)).sequences) == 1,
    ),
    "TrainingClient.save_weights_and_get_sampling_client": (
        lambda m, w: m(),
        lambda r: len(settled(r.sample(PROMPT, 1, SAMPLING)).sequences) == 1,
    ),
    "TrainingClient.get_telemetry": (lambda m, w: m(), lambda r: True),
    "SamplingClient.create": (
        lambda m, w: m(w.ServiceClient.holder, base_model=MODEL),
        lambda r: settled(r.get_base_model()) == MODEL,
    ),
    "SamplingClient.sample": (
        lambda m, w: m(PROMPT, 2, SAMPLING),
        lambda r: len(r.sequences) == 2,
    ),
    "SamplingClient.compute_logprobs": (lambda m, w: m(PROMPT), lambda r: len(r) == 3),
    "SamplingClient.get_tokenizer": (lambda m, w: m(), lambda r: r.encode("ab")),
    "SamplingClient.get_base_model": (lambda m, w: m(), lambda r: r == MODEL),
    "SamplingClient.get_telemetry": (lambda m, w: m(), lambda r: True),
    "SamplingClient.get_sampler_handle": (lambda m, w: m(), bool),
    "SamplingClient.from_sampler_handle": (
        lambda m, w: m(w.SamplingClient.get_sampler_handle()),
        lambda r: len(settled(r.sample(PROMPT, 1, SAMPLING)).sequences) == 1,
    ),
    "SamplingClient.on_queue_state_change": (
        lambda m, w: m(queue_state("ACTIVE"), None),
        lambda r: r is None,
    ),
    "RestClient.get_telemetry": (lambda m, w: m(), lambda r: True),
    "RestClient.get_server_capabilities": (lambda m, w: m(), lambda r: r.supported_models),
    "RestClient.get_training_run": (lambda m, w: m(w.run), lambda r: r.base_model == MODEL),
    "RestClient.get_training_run_by_tinker_path": (
        lambda m, w: m(w.state()),
        lambda r: r.base_model == MODEL,
    ),
    "RestClient.get_weights_info_by_tinker_path": (
        lambda m, w: m(w.state()),
        lambda r: r.lora_rank == 4,
    ),
    "RestClient.list_training_runs": (lambda m, w: m(), lambda r: r.training_runs),
    "RestClient.list_checkpoints": (
        lambda m, w: (w.state(), m(w.run))[1],
        lambda r: r.checkpoints,
    ),
    "RestClient.get_external_weights_urls": (lambda m, w: m(w.external()), downloaded),
    "RestClient.delete_checkpoint": (
        lambda m, w: m(w.run, w.state().partition(f"{w.run}/")[2]),
        lambda r: r is None,
    ),
    "RestClient.delete_checkpoint_from_tinker_path": (
        lambda m, w: m(w.state()),
        lambda r: r is None,
    ),
    "RestClient.get_audit_log": (lambda m, w: m(), bool),
    "RestClient.copy_weights": (lambda m, w: m(w.state(), "other"), bool),
    "RestClient.publish_checkpoint_from_tinker_path": (
        lambda m, w: m(w.state()),
        lambda r: r is None,
    ),
    "RestClient.unpublish_checkpoint_from_tinker_path": (
        lambda m, w: m(w.state()),
        lambda r: r is None,
    ),
    "RestClient.set_checkpoint_ttl_from_tinker_path": (
        lambda m, w: m(w.state(), 3600),
        lambda r: r is None,
    ),
    "RestClient.list_user_checkpoints": (
        lambda m, w: (w.state(), m())[1],
        lambda r: r.checkpoints,
    ),
    "RestClient.get_session": (
        lambda m, w: m(w.run.partition(":")[0]),
        lambda r: r.training_run_ids,
    ),
    "RestClient.list_sessions": (lambda m, w: m(), lambda r: r.sessions),
    "RestClient.assign_session_project": (lambda m, w: m(w.run.partition(":")[0], "p"), bool),
    "RestClient.export_session_trace": (lambda m, w: m(w.run.partition(":")[0]), bool),
    "RestClient.whoami": (lambda m, w: m(), bool),
    "RestClient.get_sampler": (
        lambda m, w: m(w.SamplingClient._sampling_session_id),
        lambda r: r.base_model == MODEL,
    ),
    "RestClient.get_billing_usage": (lambda m, w: m("2026-01-01", "2026-01-02"), bool),
    "RestClient.get_current_checkpoint_storage_usage": (lambda m, w: m(), lambda r: r.data),
    "RestClient.search_sessions": (lambda m, w: m(SessionSearchRequest()), bool),
    "AdminClient.get_telemetry": (lambda m, w: m(), lambda r: True),
    "AdminClient.get_audit_log": (lambda m, w: m(day=date(2026, 1, 1)), bool),
    "AdminClient.get_billing_usage": (lambda m, w: m("2026-01-01", "2026-01-02"), bool),
    "AdminClient.get_current_checkpoint_storage_usage": (lambda m, w: m(), lambda r: r.data),
}

"""The call, given the method and the world; and what must hold of its result."""


def closing(method: Any) -> Any:
    """Of a client of its own: the others go on."""
    other = tinker.ServiceClient()
    settled(other.create_lora_training_client(MODEL, rank=1))
    return getattr(other, method.__name__)("success", "done")


def queue_state(which: str) -> Any:
    from tinker.lib.api_future_impl import QueueState

    return QueueState[which]


def settled(value: Any) -> Any:
    """The result of a future, or of a coroutine that may answer one."""
    if inspect.iscoroutine(value):
        value = asyncio.run(_awaited(value))
    return value.result(timeout=60) if hasattr(value, "result") else value


async def _awaited(coroutine: Any) -> Any:
    value = await coroutine
    return await value if inspect.isawaitable(value) else value


def refusal(world: World, client: str, method: str) -> str | None:
    """What the server says if it refuses, or None."""
    call, holds = CALLS[f"{client}.{method.removesuffix('_async')}"]
    try:
        result = settled(call(getattr(getattr(world, client), method), world))
    except tinker.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        return str(body.get("detail", error))
    except RuntimeError as error:  # what the client refuses itself
        return str(error)
    assert holds(result), (client, method, result)
    return None


def main() -> None:
    warnings.simplefilter("ignore")
    world, rows = World(), ["| method | | |", "|---|---|---|"]
    for client in CLIENTS:
        names = [n for n, _ in inspect.getmembers(getattr(tinker, client), callable)]
        for method in names:
            if method.startswith("_") or method.endswith("_async"):
                continue
            twins = [one for one in (method, f"{method}_async") if one in names]
            told = {refusal(world, client, one) for one in twins}
            assert len(told) == 1, (client, method, told)
            refused, called = told.pop(), f"{client}.{method}"
            status = "refused" if refused else "differs" if called in DIFFERS else "works"
            note = refused or DIFFERS.get(called) or NOTES.get(called, "")
            rows.append(f"| `{called}` | {status} | {' '.join(note.split())} |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
