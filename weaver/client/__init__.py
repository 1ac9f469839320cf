"""The clients: an async core, and thin sync classes over it."""

from weaver.client.handle import OperationHandle
from weaver.client.portal import Handle
from weaver.client.sampling import AsyncSamplingClient
from weaver.client.service import AsyncServiceClient
from weaver.client.sync import SamplingClient, ServiceClient, TrainingClient
from weaver.client.training import AsyncTrainingClient

__all__ = ["AsyncSamplingClient", "AsyncServiceClient", "AsyncTrainingClient", "OperationHandle"]
__all__ += ["Handle", "SamplingClient", "ServiceClient", "TrainingClient"]
