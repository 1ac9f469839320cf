"""What the Weaver REST interface says: of runs, checkpoints, models, results and refusals.

A `RestNote` travels with each operation through the journal, so that its answer can also be made by
a process that was started after the one that accepted it. Ids and paths are computed from native
ones, so that none is stored:

| there                                | here                                        |
|--------------------------------------|---------------------------------------------|
| weaver://<model>/checkpoints/<name>  | weaver://<run>/weights/<name>               |
| weaver://<model>/sampler/<name>      | the same                                    |
| a checkpoint's or artifact's UUID    | UUID 5 of its path                          |
| a sampling session's id              | the sampler's id in base64url               |
"""

from __future__ import annotations

import base64
import uuid
from typing import TYPE_CHECKING, TypeVar

from fastapi.responses import JSONResponse
from pydantic_core import to_json

from weaver import errors, protocol, types
from weaver.server.adapters.weaver_rest.bodies import MERGED
from weaver.server.http.caller_session import Entry, Note

if TYPE_CHECKING:
    from weaver.server.http.errors import Refusal

T = TypeVar("T")
KINDS = {"weights": "weight", "weights_and_optimizer": "weight_and_optimizer"}
ARTIFACTS = ("hf_adapter", "hf_model")
PRICED = (
    "training_tokens",
    "sampling_prefill_tokens",
    "sampling_cached_prefill_tokens",
    "sampling_output_tokens",
)


class RestNote(Note):
    """What an answer needs beside the operation's result."""

    artifact: bool = False
    """The checkpoint was made to be downloaded."""
    samples: int = 0
    old_logprobs: bool = False


class JsonResponse(JSONResponse):
    """Writes what JSON has no word for as null."""

    def render(self, content: object) -> bytes:
        return to_json(content)


def refused(refusal: Refusal) -> JSONResponse:
    error = refusal.error
    content = {
        "error": error.code,
        "message": str(error),
        "retryable": refusal.retryable,
        "request_id": refusal.request_id,
        "details": {"field": error.field, "hint": error.hint},
    }
    return refusal.answer(content)


def operation_json(entry: Entry) -> types.JsonDict:
    """An operation as it stands; may be slow."""
    head: types.JsonDict = {"id": entry.id, "status": "pending"}
    outcome = entry.outcome
    if outcome is None:
        return head
    note = RestNote(**entry.note.model_dump())
    if outcome.result is not None:
        return head | {"status": "done", "response": _answer(outcome.result, note)}
    assert outcome.error is not None
    if outcome.error.code == "cancelled" and note.samples:  # a pause has ended it
        nothing = {"tokens": [], "logprobs": [], "text": "", "stop_reason": "abort"}
        response = {"result": {"sequences": [nothing] * note.samples}}
        return head | {"status": "done", "response": response}
    return head | {
        "status": "error",
        "error": outcome.error.code,
        "error_code": outcome.error.code,
        "error_message": str(outcome.error.to_error()),
        "retryable": False,
    }


def checkpoint_json(info: types.CheckpointInfo) -> types.JsonDict:
    lora, kind = info.lora_config or types.LoraConfig(), KINDS.get(info.kind, "sampling")
    return {
        **info.model_dump(mode="json", exclude={"run_id", "kind", "lora_config", "folder"}),
        **lora.model_dump(include={"train_attn", "train_mlp", "train_unembed"}),
        "id": uuid_of(info.path),
        "model_id": info.run_id,
        "path": rest_path(info.path),
        "type": kind,
        "checkpoint_type": kind,
        "status": "completed",
    }


def artifact_kind(info: types.CheckpointInfo) -> str:
    """What an export is that asks for nothing else."""
    whole = info.training_mode == "full_ft" or info.name.startswith(MERGED)
    return "hf_model" if whole else "hf_adapter"


def artifact_id(info: types.CheckpointInfo, kind: str) -> str:
    return uuid_of(f"{info.path}/artifacts/{kind}")


def artifact_json(info: types.CheckpointInfo, kind: str) -> types.JsonDict:
    return {
        **checkpoint_json(info),
        "id": artifact_id(info, kind),
        "checkpoint_id": uuid_of(info.path),
        "kind": kind,
        "uri": f"{rest_path(info.path)}/artifacts/{kind}",
    }


def run_json(run: types.TrainingRun, *, last_seq: int) -> types.JsonDict:
    described = run.model_dump(mode="json", exclude={"run_id", "project"})
    return {
        **described,
        "id": run.run_id,
        "status": "stopped" if run.status == "stopped" else "ready",
        "last_seq_id": last_seq,
        "updated_at": described["last_request_at"],
    }


def catalog_json(model: types.ModelInfo) -> types.JsonDict:
    """Free of charge: the client lists only what has all four prices."""
    free = {"unit": "1M tokens", "unit_price_micros": 0, "version": "1"}
    return {
        "id": model.name,
        "name": model.name,
        "status": "healthy",
        "visibility": "public",
        "training_modes": model.training_modes,
        "metadata": model.model_dump(exclude={"name", "training_modes"}),
        "prices": {f"{kind}:{mode}": free for mode in model.training_modes for kind in PRICED},
    }


def _answer(result: protocol.Result, note: RestNote) -> types.JsonDict:
    match result:
        case protocol.GradientsDone(output=passed, labels=labels):
            outputs: list[types.JsonDict] = [
                {name: values.tolist() for name, values in output.items()}
                for output in passed.loss_fn_outputs
            ]
            for output, datum_id in zip(outputs, labels, strict=False):
                output |= {"datum_id": datum_id} if datum_id else {}
            metrics = dict(passed.metrics)
            return {"result": {"loss_fn_outputs": outputs, "metrics": metrics}, "metrics": metrics}
        case protocol.StepDone(output=step):
            metrics = dict(step.metrics)
            return {"metrics": metrics, "result": {"metrics": metrics}}
        case protocol.CheckpointLoaded(checkpoint=info):
            return {"checkpoint": checkpoint_json(info), "status": "succeeded"}
        case protocol.CheckpointSaved(checkpoint=info) if note.artifact:
            return artifact_json(info, artifact_kind(info))
        case protocol.CheckpointSaved(checkpoint=info):
            session_id = sampling_session_of(info.path)
            sampler = {"model_path": info.path, "sampling_session_id": session_id}
            return checkpoint_json(info) | (sampler if info.kind == "sampler" else {})
        case protocol.Sampled(output=sampled):
            return {"result": _sampled(sampled, old_logprobs=note.old_logprobs)}
    return {}  # of an operation that its route answered for itself


def _sampled(output: types.SampleResult, *, old_logprobs: bool) -> types.JsonDict:
    prompt: types.JsonDict = {}
    if output.prompt_logprobs is not None:
        prompt["prompt_logprobs"] = output.prompt_logprobs
    if (top := output.prompt_top_logprobs) is not None:
        rows = zip(top.tokens.tolist()[1:], top.logprobs.tolist()[1:], strict=True)
        pairs = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in rows]
        prompt["topk_prompt_logprobs"] = [None, *pairs]
    if not output.sequences:
        return prompt
    sequences = [
        {
            **sequence.model_dump(include={"tokens", "text", "logprobs", "stop_reason"}),
            "weight_version": sequence.weights_version,
            **({"old_logprobs": sequence.logprobs} if old_logprobs else {}),
        }
        for sequence in output.sequences
    ]
    usage = {
        "prompt_tokens": len(output.prompt_tokens),
        "completion_tokens": sum(len(sequence.tokens) for sequence in output.sequences),
    }
    version = output.sequences[0].weights_version
    return {"sequences": sequences, "usage": usage, "weight_version": version, **prompt}


# --- ids and paths -------------------------------------------------------------------------------


def native_path(path: str) -> str:
    return path.replace("/checkpoints/", "/weights/", 1)


def rest_path(path: str) -> str:
    return path.replace("/weights/", "/checkpoints/", 1)


def uuid_of(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path))


def sampling_session_of(sampler_id: str) -> str:
    return base64.urlsafe_b64encode(sampler_id.encode()).decode().rstrip("=")


def sampler_of(sampling_session: str) -> str:
    """Raises NotFoundError."""
    padded = sampling_session + "=" * (-len(sampling_session) % 4)
    try:
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except ValueError:
        raise errors.NotFoundError(
            f"no sampling session is called {sampling_session[:80]!r}.", field="sampling_session"
        ) from None


async def find_checkpoint(service: protocol.Service, reference: str) -> types.CheckpointInfo:
    """By its path of either form, or by its id.

    Raises:
        CheckpointNotFoundError
    """
    if "://" in reference:
        return await service.get_checkpoint(native_path(reference))
    known = {uuid_of(info.path): info for info in await service.list_checkpoints()}
    return by_id(known, reference)


def by_id(known: dict[str, T], wanted: str) -> T:
    """Raises CheckpointNotFoundError."""
    if wanted not in known:
        raise errors.CheckpointNotFoundError(
            f"no checkpoint or artifact has the id {wanted[:80]!r}.",
            field="id",
            hint="GET /models/{model_id}/checkpoints lists them.",
        )
    return known[wanted]
