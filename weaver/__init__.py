"""Weaver: post-training of language models, from a laptop to a shared server.

    from weaver import ServiceClient, types

Clients and types are imported when they are first used, so that `import weaver` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from weaver import errors
from weaver.errors import *

if TYPE_CHECKING:
    from weaver import types
    from weaver.client import *
    from weaver.tensors import TensorData
    from weaver.types import *

__all__ = ["AsyncRewardClient", "AsyncSamplingClient", "AsyncServiceClient", "AsyncTrainingClient"]
__all__ += ["Handle", "OperationHandle"]
__all__ += ["RewardClient", "SamplingClient", "ServiceClient", "TrainingClient"]
__all__ += ["Datum", "EncodedTextChunk", "Message", "ModelInput", "TensorData", "types"]
__all__ += ["AdamParams", "LoraConfig", "SamplingParams"]
__all__ += ["ForwardBackwardResult", "OptimStepResult"]
__all__ += ["SampleDelta", "SampleResult", "SampledSequence", "TopLogprobs"]
__all__ += ["CheckpointInfo", "MetricPoint", "ModelInfo", "TrainingRun"]
__all__ += errors.__all__


def __getattr__(name: str) -> object:
    if name == "types":
        return import_module("weaver.types")
    if name in __all__:
        values = import_module("weaver.types")
        return getattr(values, name, None) or getattr(import_module("weaver.client"), name)
    if name == "__version__":
        return version("weaver-post-training")
    raise AttributeError(f"module 'weaver' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
