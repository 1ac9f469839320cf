"""Weaver: post-training of language models, from a laptop to a shared server.

    from weaver import ServiceClient, types

Clients and types are imported when they are first used, so that `import weaver` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from weaver import errors
from weaver.errors import *

if TYPE_CHECKING:
    from weaver import types
    from weaver.client import *
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
    "CheckpointInfo",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardResult",
    "Handle",
    "LoraConfig",
    "Message",
    "MetricPoint",
    "ModelInfo",
    "ModelInput",
    "OperationHandle",
    "OptimStepResult",
    "SampleDelta",
    "SampleResult",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "TensorData",
    "TrainingClient",
    "TrainingRun",
    "types",
]
__all__ += errors.__all__


def __getattr__(name: str) -> object:
    if name == "types":
        return import_module("weaver.types")
    if name in __all__:
        values = import_module("weaver.types")
        return getattr(values, name, None) or getattr(import_module("weaver.client"), name)
    raise AttributeError(f"module 'weaver' has no attribute {name!r}")
