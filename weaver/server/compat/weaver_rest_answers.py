"""What the Weaver REST interface says of runs, checkpoints, models and results; pure functions.

A `Note` travels with each operation through the journal, so that its answer can also be made by a
process that was started after the one that accepted it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver.protocol import CheckpointLoaded, CheckpointSaved, GradientsDone, Sampled, StepDone
from weaver.server.compat.weaver_rest_ids import rest_path, session_of, uuid_of
from weaver.server.compat.weaver_rest_tensors import Body
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from weaver.protocol import Outcome, Result
    from weaver.types import CheckpointInfo, JsonDict, ModelInfo, SampleResult, TrainingRun

KINDS = {"weights": "weight", "weights_and_optimizer": "weight_and_optimizer"}
ARTIFACTS = ("hf_adapter", "hf_model")
MERGED = "export-merged-"
"""How the names of checkpoints begin that were made to be downloaded as whole models."""
PRICED = (
    "training_tokens",
    "sampling_prefill_tokens",
    "sampling_cached_prefill_tokens",
    "sampling_output_tokens",
)


class Note(Body):
    """What an answer needs beside the operation's result."""

    key: str | None = None
    """What a resend of the same request has in common with it."""
    artifact: bool = False
    """The checkpoint was made to be downloaded."""
    sampler_id: str | None = None
    samples: int = 0
    old_logprobs: bool = False


def envelope(operation_id: str, outcome: Outcome | None, note: Note) -> JsonDict:
    """An operation as it stands; may be slow."""
    head: JsonDict = {"id": operation_id, "status": "pending"}
    if outcome is None:
        return head
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


def checkpoint_json(info: CheckpointInfo) -> JsonDict:
    lora, kind = info.lora_config or LoraConfig(), KINDS.get(info.kind, "sampling")
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


def artifact_kind(info: CheckpointInfo) -> str:
    """What an export is that asks for nothing else."""
    whole = info.training_mode == "full_ft" or info.name.startswith(MERGED)
    return "hf_model" if whole else "hf_adapter"


def artifact_id(info: CheckpointInfo, kind: str) -> str:
    return uuid_of(f"{info.path}/artifacts/{kind}")


def artifact_json(info: CheckpointInfo, kind: str) -> JsonDict:
    return {
        **checkpoint_json(info),
        "id": artifact_id(info, kind),
        "checkpoint_id": uuid_of(info.path),
        "kind": kind,
        "uri": f"{rest_path(info.path)}/artifacts/{kind}",
    }


def run_json(run: TrainingRun, *, last_seq: int) -> JsonDict:
    described = run.model_dump(mode="json", exclude={"run_id", "project"})
    return {
        **described,
        "id": run.run_id,
        "status": "stopped" if run.status == "stopped" else "ready",
        "last_seq_id": last_seq,
        "updated_at": described["last_request_at"],
    }


def catalog_json(model: ModelInfo) -> JsonDict:
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


def _answer(result: Result, note: Note) -> JsonDict:
    match result:
        case GradientsDone(output=passed, labels=labels):
            outputs: list[JsonDict] = [
                {name: values.tolist() for name, values in output.items()}
                for output in passed.loss_fn_outputs
            ]
            for output, datum_id in zip(outputs, labels, strict=False):
                output |= {"datum_id": datum_id} if datum_id else {}
            metrics = dict(passed.metrics)
            return {"result": {"loss_fn_outputs": outputs, "metrics": metrics}, "metrics": metrics}
        case StepDone(output=step):
            metrics = dict(step.metrics)
            return {"metrics": metrics, "result": {"metrics": metrics}}
        case CheckpointLoaded(checkpoint=info):
            return {"checkpoint": checkpoint_json(info), "status": "succeeded"}
        case CheckpointSaved(checkpoint=info) if note.artifact:
            return artifact_json(info, artifact_kind(info))
        case CheckpointSaved(checkpoint=info):
            sampler = {"model_path": info.path, "sampling_session_id": session_of(info.path)}
            return checkpoint_json(info) | (sampler if info.kind == "sampler" else {})
        case Sampled(output=sampled):
            return {"result": _sampled(sampled, old_logprobs=note.old_logprobs)}
    return {}  # of an operation that its route answered for itself


def _sampled(output: SampleResult, *, old_logprobs: bool) -> JsonDict:
    prompt = {} if output.prompt_logprobs is None else {"prompt_logprobs": output.prompt_logprobs}
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
