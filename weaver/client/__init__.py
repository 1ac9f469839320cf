"""The clients: an async core, and thin sync classes over it."""

from weaver.client.handle import OperationHandle
from weaver.client.portal import Handle
from weaver.client.rewards import AsyncRewardClient
from weaver.client.sampling import AsyncSamplingClient
from weaver.client.service import AsyncServiceClient
from weaver.client.sync import RewardClient, SamplingClient, ServiceClient, TrainingClient
from weaver.client.training import AsyncTrainingClient

__all__ = ["AsyncRewardClient", "AsyncSamplingClient", "AsyncServiceClient", "AsyncTrainingClient"]
__all__ += ["Handle", "OperationHandle"]
__all__ += ["RewardClient", "SamplingClient", "ServiceClient", "TrainingClient"]
