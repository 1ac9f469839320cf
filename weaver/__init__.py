"""Weaver: post-training of language models, from a laptop to a shared server.

    from weaver import ServiceClient, types

Clients and types are imported when they are first used, so that `import weaver` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from weaver.errors import (
    AuthenticationError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ClosedError,
    ConfigError,
    ConflictError,
    ContextLengthError,
    EngineError,
    GradientsDiscardedError,
    InvalidDatumError,
    InvalidLossConfigError,
    InvalidNameError,
    InvalidParamsError,
    InvalidRequestError,
    MissingDependencyError,
    NameTakenError,
    NoGradientsError,
    NonFiniteError,
    NotFoundError,
    OperationCancelledError,
    OperationError,
    PermissionDeniedError,
    QuotaExceededError,
    RunNotFoundError,
    ServiceConnectionError,
    StorageError,
    TokenOutOfRangeError,
    TooLargeError,
    UnknownLossError,
    UnknownModelError,
    UnsupportedError,
    WaitTimeoutError,
    WeaverError,
)

if TYPE_CHECKING:
    from weaver import types
    from weaver.client import (
        AsyncSamplingClient,
        AsyncServiceClient,
        AsyncTrainingClient,
        Handle,
        OperationHandle,
        SamplingClient,
        ServiceClient,
        TrainingClient,
    )
    from weaver.tensors import TensorData
    from weaver.types import (
        AdamParams,
        CheckpointInfo,
        Datum,
        EncodedTextChunk,
        ForwardBackwardResult,
        LoraConfig,
        Message,
        MetricPoint,
        ModelInfo,
        ModelInput,
        OptimStepResult,
        SampleDelta,
        SampledSequence,
        SampleResult,
        SamplingParams,
        TrainingRun,
    )

__all__ = [
    "AdamParams",
    "AsyncSamplingClient",
    "AsyncServiceClient",
    "AsyncTrainingClient",
    "AuthenticationError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "ClosedError",
    "ConfigError",
    "ConflictError",
    "ContextLengthError",
    "Datum",
    "EncodedTextChunk",
    "EngineError",
    "ForwardBackwardResult",
    "GradientsDiscardedError",
    "Handle",
    "InvalidDatumError",
    "InvalidLossConfigError",
    "InvalidNameError",
    "InvalidParamsError",
    "InvalidRequestError",
    "LoraConfig",
    "Message",
    "MetricPoint",
    "MissingDependencyError",
    "ModelInfo",
    "ModelInput",
    "NameTakenError",
    "NoGradientsError",
    "NonFiniteError",
    "NotFoundError",
    "OperationCancelledError",
    "OperationError",
    "OperationHandle",
    "OptimStepResult",
    "PermissionDeniedError",
    "QuotaExceededError",
    "RunNotFoundError",
    "SampleDelta",
    "SampleResult",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "ServiceConnectionError",
    "StorageError",
    "TensorData",
    "TokenOutOfRangeError",
    "TooLargeError",
    "TrainingClient",
    "TrainingRun",
    "UnknownLossError",
    "UnknownModelError",
    "UnsupportedError",
    "WaitTimeoutError",
    "WeaverError",
    "types",
]


def __getattr__(name: str) -> object:
    if name == "types":
        return import_module("weaver.types")
    if name in __all__:
        values = import_module("weaver.types")
        return getattr(values, name, None) or getattr(import_module("weaver.client"), name)
    raise AttributeError(f"module 'weaver' has no attribute {name!r}")
