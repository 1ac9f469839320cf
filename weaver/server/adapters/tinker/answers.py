"""What Tinker's protocol says: of outcomes, runs and checkpoints, and of refusals.

| there                                 | here                              |
|---------------------------------------|-----------------------------------|
| tinker://<model>/weights/<name>       | weaver://<run>/weights/<name>     |
| tinker://<model>/sampler_weights/<..> | weaver://<run>/sampler/<name>     |
| tinker://<model>/external_weights/<.> | weaver://<run>/weights/external-<> |

A model's id says of which run it is (`session.run_of`), and a run's metadata what its model is
called; a run that another protocol made is called by its own id.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi.responses import JSONResponse, Response

from weaver import errors, protocol, types
from weaver.server.adapters.tinker import messages, tensors
from weaver.server.adapters.tinker.session import run_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.server.adapters.tinker.session import Future, Note
    from weaver.server.http.errors import Refusal
    from weaver.tensors import TensorData

SCHEME = "tinker://"
EXTERNAL = "external-"
"""How the names of weights begin that were saved to be downloaded; they have no optimizer."""
GROUPS = {
    "weights": "weights/",
    "sampler_weights": "sampler/",
    "external_weights": f"weights/{EXTERNAL}",
}
SEGMENTS = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}
SAVED = {
    "training": "save_weights",
    "sampler": "save_weights_for_sampler",
    "external": "save_weights_external",
}
STATUSES = {409: 400, 500: 400, 503: 408, 504: 408, 507: 400}
"""Clients send a request that got another status again for minutes, some without a pause."""
NO_LOGPROB = -99999.0
"""That of a token which is none, by which clients know it."""
OURS = ("engine_error", "storage_error", "connection_failed", "timeout")
"""Codes of failures that are no mistake of the client."""
SUFFIXES = {
    "loss_sum": "loss:sum",
    "weight_sum": "weight:sum",
    "num_tokens": "num_tokens:sum",
    "ratio_min": "ratio:min",
    "ratio_max": "ratio:max",
}
"""A client reduces the metrics of several requests by what is behind the colon."""


def refused(refusal: Refusal) -> JSONResponse:
    """The status says whether the client tries again; `detail` is what its user reads."""
    error = refusal.error
    content = {"detail": str(error), "code": error.code, "request_id": refusal.request_id}
    answer = refusal.answer(content)
    answer.status_code = STATUSES.get(refusal.status, refusal.status)
    return answer


def failed(error: errors.WeaverError) -> types.JsonDict:
    """What a future says that has failed: a status of its own would be tried again without end."""
    return {"error": str(error), "category": "server" if error.code in OURS else "user"}


def future_answer(future: Future, *, binary: bool) -> Response:
    """Of one that has ended; may be slow. `binary`: the client reads protobuf."""
    outcome, note = future.outcome, future.note
    assert outcome is not None
    if outcome.error is not None:
        if outcome.error.code == "no_gradients":  # legal there: nothing is stepped
            return JSONResponse({"metrics": {"skipped:sum": 1.0}, "type": "optim_step"})
        return JSONResponse(failed(outcome.error.to_error()))
    match outcome.result:
        case protocol.GradientsDone(output=output):
            metrics = _pass_metrics(output.metrics, loss_fn=note.loss_fn)
            logprobs = [one["logprobs"] for one in output.loss_fn_outputs]
            if not binary:
                return JSONResponse(_pass_json(logprobs, metrics))
            return _message(_pass_message(logprobs, metrics))
        case protocol.Sampled(output=whole):
            sampled = _last(whole, note)
            if not binary:
                return JSONResponse(_sample_json(sampled, note))
            return _message(_sample_message(sampled, note))
        case protocol.ModelCreated():
            return JSONResponse({"model_id": note.model_id, "type": "create_model"})
        case protocol.StepDone(output=step):
            return JSONResponse({"metrics": dict(step.metrics), "type": "optim_step"})
        case protocol.CheckpointLoaded(checkpoint=info):
            return JSONResponse(
                {"path": tinker_path(info, {}), "model_id": note.model_id, "type": "load_weights"}
            )
        case protocol.CheckpointSaved() if note.sampling_session:
            return JSONResponse(
                {"sampling_session_id": note.sampling_session, "type": "save_weights_for_sampler"}
            )
        case protocol.CheckpointSaved(checkpoint=info):
            names = {info.run_id: note.model_id}
            answer = {"path": tinker_path(info, names), "type": SAVED[kind_of(info)]}
            return JSONResponse(answer)
    raise AssertionError(future.id)


def _message(message: Any) -> Response:
    return Response(message.SerializeToString(deterministic=True), media_type=messages.MEDIA_TYPE)


# --- training -------------------------------------------------------------------------------------


def _pass_metrics(metrics: Mapping[str, float], *, loss_fn: str) -> dict[str, float]:
    named = {SUFFIXES.get(n, f"{n}:mean"): v for n, v in metrics.items() if n != "loss"}
    if (
        loss_fn == "stable_reinforce"
    ):  # whose formula is not published: ours, as docs/tinker.md has it
        named["stable_reinforce_is_truncated_importance_sampling:max"] = 1.0
    return named


def _pass_json(logprobs: Sequence[TensorData], metrics: Mapping[str, float]) -> types.JsonDict:
    outputs = [
        {
            "logprobs": {
                "data": one.to_numpy().ravel().tolist(),
                "dtype": "float32",
                "shape": list(one.shape),
            }
        }
        for one in logprobs
    ]
    return {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": outputs,
        "metrics": dict(metrics),
    }


def _pass_message(logprobs: Sequence[TensorData], metrics: Mapping[str, float]) -> Any:
    """One record for each run of datums with as many targets at a position."""
    arrays = [np.ascontiguousarray(one.to_numpy(), "<f4") for one in logprobs]
    message = messages.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for trailing, alike in groupby(arrays, lambda array: array.shape[1:]):
        some = list(alike)
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(some))
        batch = record.fields["logprobs"]
        batch.data = b"".join(array.tobytes() for array in some)
        batch.offsets = np.cumsum([0, *(array.nbytes for array in some)], dtype="<i8").tobytes()
        batch.dtype = messages.FLOAT32
        batch.trailing_shape.extend(trailing)
    message.metrics.update(metrics)
    return message


# --- sampling -------------------------------------------------------------------------------------


def _last(output: types.SampleResult, note: Note) -> types.SampleResult:
    """Nothing is told of the tokens of a prompt before the last `last_n`."""
    if note.last_n is None:
        return output
    gone = len(output.prompt_tokens) - note.last_n
    told: dict[str, object] = {}
    if output.prompt_logprobs is not None:
        told["prompt_logprobs"] = (*(None,) * gone, *output.prompt_logprobs[gone:])
    if (top := output.prompt_top_logprobs) is not None:
        tokens, logprobs = top.tokens.to_numpy().copy(), top.logprobs.to_numpy().copy()
        tokens[:gone], logprobs[:gone] = -1, np.nan
        told["prompt_top_logprobs"] = types.TopLogprobs(tokens=tokens, logprobs=logprobs)
    return output.model_copy(update=told)


def _logprobs(sequence: types.SampledSequence, note: Note) -> Sequence[float]:
    return sequence.logprobs if note.temperature == 1 else sequence.sampling_logprobs


def _top(sequence: types.SampledSequence, note: Note) -> types.TopLogprobs | None:
    """Under the temperature, too: what it does to the token drawn it does to those beside it."""
    top = sequence.top_logprobs
    if top is None or note.temperature == 1:
        return top
    drawn, tempered = (
        np.array(x)[:, None] for x in (sequence.logprobs, sequence.sampling_logprobs)
    )
    moved = (top.logprobs.to_numpy() - drawn) / note.temperature + tempered
    return types.TopLogprobs(tokens=top.tokens, logprobs=moved)


def _sample_json(output: types.SampleResult, note: Note) -> types.JsonDict:
    return {
        "type": "sample",
        "sequences": [
            {
                "tokens": list(one.tokens),
                "logprobs": list(_logprobs(one, note)),
                "stop_reason": one.stop_reason,
            }
            for one in output.sequences
        ],
        "prompt_logprobs": output.prompt_logprobs and list(output.prompt_logprobs),
        "topk_prompt_logprobs": _top_json(output.prompt_top_logprobs),
    }


def _top_json(top: types.TopLogprobs | None) -> list[list[tuple[int, float]] | None] | None:
    if top is None:
        return None
    rows = zip(top.tokens.tolist(), top.logprobs.tolist(), strict=True)
    return [None if ids[0] < 0 else list(zip(ids, lps, strict=True)) for ids, lps in rows]


def _sample_message(output: types.SampleResult, note: Note) -> Any:
    message = messages.SampleResponse()
    for one in output.sequences:
        reason = messages.STOP if one.stop_reason == "stop" else messages.LENGTH
        sequence = message.sequences.add(
            stop_reason=reason,
            tokens=np.asarray(one.tokens, "<i4").tobytes(),
            logprobs=np.asarray(_logprobs(one, note), "<f4").tobytes(),
        )
        if (top := _top(one, note)) is not None:
            _write_top(sequence.topk_sampled_logprobs, top)
    if output.prompt_logprobs is not None:
        floats = [np.nan if one is None else one for one in output.prompt_logprobs]
        message.prompt_logprobs = np.asarray(floats, "<f4").tobytes()
    if output.prompt_top_logprobs is not None:
        _write_top(message.topk_prompt_logprobs, output.prompt_top_logprobs)
    if output.prompt_target_logprobs is not None:
        of_targets = output.prompt_target_logprobs.to_numpy()[1:]
        tensors.write(message.target_prompt_logprobs, of_targets, sparse=note.sparse_targets)
    return message


def _write_top(message: Any, top: types.TopLogprobs) -> None:
    tokens, logprobs = top.tokens.to_numpy(), top.logprobs.to_numpy()
    message.length, message.k = tokens.shape
    message.token_ids = tokens.clip(min=0).astype("<i4").tobytes()
    message.logprobs = np.nan_to_num(logprobs, nan=NO_LOGPROB).astype("<f4").tobytes()


# --- runs and checkpoints -------------------------------------------------------------------------


def model_of(run: types.TrainingRun) -> str:
    """What its clients call it."""
    given = run.user_metadata.get("tinker")
    return str(given["model_id"]) if isinstance(given, dict) and "model_id" in given else run.run_id


def metadata_of(run: types.TrainingRun) -> dict[str, str]:
    """Its user's, with texts for values."""
    return {name: str(value) for name, value in run.user_metadata.items() if name != "tinker"}


def kind_of(info: types.CheckpointInfo) -> str:
    """Its type there."""
    if info.kind == "weights" and info.name.startswith(EXTERNAL):
        return "external"
    return "sampler" if info.kind == "sampler" else "training"


def checkpoint_id(info: types.CheckpointInfo) -> str:
    kind = kind_of(info)
    name = info.name.removeprefix(EXTERNAL) if kind == "external" else info.name
    return f"{SEGMENTS[kind]}/{name}"


def tinker_path(info: types.CheckpointInfo, names: Mapping[str, str]) -> str:
    """`names`: what runs are called."""
    return f"{SCHEME}{names.get(info.run_id) or info.run_id}/{checkpoint_id(info)}"


def native_path(path: str) -> str:
    """Raises InvalidRequestError."""
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in GROUPS:
        raise errors.InvalidRequestError(
            f"is {path[:200]!r}.",
            field="path",
            hint="Such as tinker://<model>/weights/<name> or tinker://<model>/sampler_weights/<name>.",
        )
    return f"weaver://{run_of(parts[0])}/{GROUPS[parts[1]]}{parts[2]}"


def run_json(
    run: types.TrainingRun, checkpoints: Sequence[types.CheckpointInfo], *, owner: str
) -> types.JsonDict:
    names = {run.run_id: model_of(run)}
    newest: dict[str, types.JsonDict] = {}
    for info in sorted(checkpoints, key=lambda one: one.created_at):
        newest[kind_of(info)] = checkpoint_json(info, names)
    return {
        "training_run_id": model_of(run),
        "base_model": run.base_model,
        "model_owner": owner,
        "is_lora": run.training_mode == "lora",
        "lora_rank": run.lora_config and run.lora_config.rank,
        "last_request_time": run.last_request_at.isoformat(),
        "last_checkpoint": newest.get("training"),
        "last_sampler_checkpoint": newest.get("sampler"),
        "user_metadata": metadata_of(run),
    }


def checkpoint_json(info: types.CheckpointInfo, names: Mapping[str, str]) -> types.JsonDict:
    return {
        "checkpoint_id": checkpoint_id(info),
        "checkpoint_type": kind_of(info),
        "time": info.created_at.isoformat(),
        "tinker_path": tinker_path(info, names),
        "size_bytes": info.size_bytes,
        "expires_at": info.expires_at and info.expires_at.isoformat(),
    }
