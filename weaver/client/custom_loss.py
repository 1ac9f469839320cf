"""`forward_backward_custom`: any differentiable function of the log-probabilities as a loss.

One forward pass gives the log-probabilities lp; the user's function gives a loss L(lp), whose
gradient c = ∂L/∂lp is found here by autograd; a `surrogate` pass with the loss Σ c·lp then has, by
the chain rule, exactly the parameters' gradient of L. `AsyncTrainingClient` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from weaver.errors import InvalidRequestError, MissingDependencyError, NonFiniteError
from weaver.types import Datum, ForwardBackwardResult

if TYPE_CHECKING:
    import torch

CustomLoss: TypeAlias = (
    "Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]"
)


def require_torch() -> None:
    """Raises MissingDependencyError where torch is not installed."""
    if find_spec("torch") is None:  # importing it takes seconds, which the event loop lacks
        raise MissingDependencyError(
            "a custom loss needs torch.", hint='Run: pip install "weaver-post-training[engine]"'
        )


def targets_only(datums: Sequence[Datum]) -> Sequence[Datum]:
    """The datums without the inputs that only the user's function reads, ready to be checked."""
    if not isinstance(datums, Sequence):
        return datums
    return [_targets_only(datum) if isinstance(datum, Datum) else datum for datum in datums]


def tokens_only(datums: Sequence[Datum]) -> Sequence[Datum]:
    """For a scalar head: datums whose scores are asked, in the form of a surrogate of no weight."""
    if not isinstance(datums, Sequence):
        return datums
    weights = {"surrogate_weights": [0.0]}
    return [
        Datum(model_input=one.model_input, loss_fn_inputs=weights)
        if isinstance(one, Datum)
        else one
        for one in datums
    ]


def differentiate(
    datums: Sequence[Datum], forward: ForwardBackwardResult, loss_fn: CustomLoss
) -> tuple[tuple[Datum, ...], ForwardBackwardResult]:
    """Runs the user's function; answers the surrogate's datums and the result to report.

    Raises:
        InvalidRequestError: the function did not return a scalar tensor and a mapping of numbers.
        NonFiniteError: the loss or its gradient is NaN or infinite.
    """
    import torch

    logprobs_D = [
        next(iter(out.values())).to_torch().requires_grad_() for out in forward.loss_fn_outputs
    ]
    with torch.enable_grad():
        returned = loss_fn(list(datums), logprobs_D)
        loss, metrics = _checked(returned)
        gradients_D = torch.autograd.grad(loss, logprobs_D, allow_unused=True)
    surrogate = []
    scored = any("scores" in out for out in forward.loss_fn_outputs)
    for i, (datum, gradient) in enumerate(zip(datums, gradients_D, strict=True)):
        weights = torch.zeros_like(logprobs_D[i]) if gradient is None else gradient
        if not bool(torch.isfinite(weights).all()):
            raise NonFiniteError(
                "the custom loss has a gradient of NaN or infinity.", field=f"datums[{i}]"
            )
        inputs: dict[str, object] = {"surrogate_weights": weights}
        if not scored:
            inputs["target_tokens"] = datum.loss_fn_inputs["target_tokens"]
        surrogate.append(Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    result = ForwardBackwardResult(
        loss_fn_outputs=forward.loss_fn_outputs, metrics={**metrics, "loss": loss.item()}
    )
    return tuple(surrogate), result


def _targets_only(datum: Datum) -> Datum:
    inputs = {name: x for name, x in datum.loss_fn_inputs.items() if name == "target_tokens"}
    return datum.model_copy(update={"loss_fn_inputs": inputs})


def _checked(returned: object) -> tuple[torch.Tensor, dict[str, float]]:
    import torch

    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise InvalidRequestError(
            f"returned a {type(returned).__name__}.",
            field="loss_fn",
            hint='Return (loss, metrics), such as (loss, {"mean": 0.5}).',
        )
    loss, metrics = returned
    if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise InvalidRequestError(
            "returned a loss that is not a scalar tensor made from the log-probabilities.",
            field="loss_fn",
            hint="Do not detach them, and reduce the loss with .sum() or .mean().",
        )
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the custom loss is {loss.item()}.", field="loss_fn")
    return loss, {str(name): float(torch.as_tensor(x).detach()) for name, x in metrics.items()}
