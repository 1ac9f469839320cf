"""`Draft`: one sample while it is drawn; of `TorchSampler`, and of the fake engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weaver.engine.torch.stops import Continuation
from weaver.types import SampleDelta, SampledSequence

if TYPE_CHECKING:
    from weaver.engine.base import SampleJob, Tokenizer
    from weaver.engine.torch.stops import Stops


@dataclass(slots=True, eq=False)
class Draft:
    """Sample `index` of its job."""

    index: int
    continuation: Continuation
    stream: bool
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls, job: SampleJob, index: int, *, tokenizer: Tokenizer, length: int, stops: Stops
    ) -> Draft:
        """Of at most `length` tokens."""
        continuation = Continuation(tokenizer, stops, length=length, stream=job.stream)
        return cls(index, continuation, job.stream)

    @property
    def ended(self) -> bool:
        return self.continuation.stop_reason is not None

    def take(self, token: int, *, logprob: float, sampling_logprob: float) -> list[SampleDelta]:
        """Adds a token, which may end the sample; answers what a reader of a stream sees of it."""
        text = self.continuation.push(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        if not self.stream:
            return []
        delta = SampleDelta(
            index=self.index,
            tokens=(token,),
            text=text,
            logprobs=(logprob,),
            stop_reason=self.continuation.stop_reason,
        )
        return [delta]

    def sequence(self, *, version: int) -> SampledSequence:
        """Once it has ended; `version` is that of the weights."""
        assert self.continuation.stop_reason is not None
        return SampledSequence(
            tokens=tuple(self.continuation.tokens),
            text=self.continuation.text,
            logprobs=tuple(self.logprobs),
            sampling_logprobs=tuple(self.sampling_logprobs),
            stop_reason=self.continuation.stop_reason,
            weights_version=version,
        )
