"""What is checked of an operation before it is queued. Called by the service's `submit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver import protocol
from weaver.checks import check_datums
from weaver.errors import InvalidRequestError, WeaverError
from weaver.server.checkpoints import SCHEME, Location
from weaver.server.registry import Reach, no_run
from weaver.types import ModelInput

if TYPE_CHECKING:
    from weaver.server.limits import Limits
    from weaver.server.runs import Run

ORDERED = (
    protocol.ForwardBackward,
    protocol.OptimStep,
    protocol.SaveCheckpoint,
    protocol.LoadCheckpoint,
)


def refusal(
    submission: protocol.Submission, run: Run | None, *, reach: Reach, limits: Limits
) -> WeaverError | None:
    """Why the operation cannot be carried out, or None. `run` is the one that it names."""
    try:
        if submission.run_id is not None:
            reach.check_run(submission.run_id)
        reach.check_operation(submission.operation)
        check_size(submission.operation, limits)
        _check(submission, run)
    except WeaverError as error:
        return error
    return None


def check_size(operation: protocol.Operation | None, limits: Limits) -> None:
    """Raises TooLargeError."""
    match operation:
        case protocol.CreateModel(user_metadata=metadata):
            limits.check_metadata(metadata)
        case protocol.ForwardBackward(datums=datums):
            limits.check_tokens(sum(datum.model_input.length for datum in datums))
        case protocol.Sample(prompt=prompt, num_samples=count, params=params):
            read = prompt.length if isinstance(prompt, ModelInput) else 0
            limits.check_tokens(read + count * params.max_tokens)


def _check(submission: protocol.Submission, run: Run | None) -> None:
    operation = submission.operation
    ordered = operation is None or isinstance(operation, ORDERED)
    placed = submission.run_id is not None, submission.seq is not None
    if placed != (ordered, ordered):
        raise InvalidRequestError(
            f"{operation.kind if operation else 'a withdrawn operation'} "
            f"{'needs run_id and seq' if ordered else 'takes neither run_id nor seq'}.",
            field="submission",
            hint="Operations of a run are counted from 1 in each session.",
        )
    if ordered and run is None:
        raise no_run(submission.run_id)
    match operation:
        case protocol.ForwardBackward() if run is not None:
            check_datums(
                operation.datums,
                operation.loss_fn,
                config=operation.loss_fn_config,
                model=run.model,
            )
        case protocol.SaveCheckpoint(name=str(name)):
            protocol.check_name(name)
        case protocol.LoadCheckpoint(path=path) if path.startswith(SCHEME):
            Location.parse(path)
        case protocol.OpenSampler(base_model=None, model_path=None):
            raise InvalidRequestError(
                "needs base_model or model_path.", field="open_sampler", hint="Give one of them."
            )
        case protocol.OpenSampler(model_path=str(path)) if path.startswith(SCHEME):
            Location.parse(path)
