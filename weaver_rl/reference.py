"""What a model that stays as it is says of replies; `algorithms.preference` asks once and keeps it.

It is a number for each reply: the sum of the log-probabilities of its learned tokens, in nats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weaver import AsyncSamplingClient, AsyncTrainingClient
from weaver.errors import ConfigError
from weaver.types import Datum, ForwardBackwardResult, ModelInput
from weaver_rl import storage
from weaver_rl.guard import gather

if TYPE_CHECKING:
    import torch

AT_ONCE = 256
"""Replies that the model is asked about at the same time."""


class Reference:
    """`await Reference(folder / "reference.json").ask(datums, sampler, moved=False)`"""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._sums: dict[str, float] = {}
        if file is not None and file.exists():
            self._sums = json.loads(file.read_bytes())

    def of(self, datum: Datum) -> float:
        """The sum over the learned tokens of one that was asked about, in nats."""
        return self._sums[_key(datum)]

    async def ask(
        self,
        datums: Sequence[Datum],
        model: AsyncTrainingClient | AsyncSamplingClient,
        *,
        moved: bool,
    ) -> None:
        """Asks for what is not known yet, once.

        Args:
            model: a trainer answers with its weights as they are now.
            moved: whether these are no longer those of the reference.

        Raises:
            ConfigError: they are not, and something has to be asked.
        """
        keyed = {_key(datum): datum for datum in datums}
        missing = {key: datum for key, datum in keyed.items() if key not in self._sums}
        if missing and moved:
            raise ConfigError(
                f"the run goes on with {len(missing)} replies that it had not when it began.",
                field="reference",
                hint="Give a sampler with the weights it began with, or keep its steps and pairs.",
            )
        wanted = iter(missing.items())
        while some := list(islice(wanted, AT_ONCE)):
            asked = [datum for _, datum in some]
            if isinstance(model, AsyncTrainingClient):
                found = [one.tolist() for one in logprobs_of(await model.forward(asked))]
            else:
                texts = [whole(datum) for datum in asked]
                scored = await gather([partial(model.compute_logprobs, text) for text in texts])
                found = [list(one[1:]) for one in scored]
            for (key, datum), logprobs in zip(some, found, strict=True):
                weights = datum.loss_fn_inputs["weights"].tolist()
                self._sums[key] = float(np.dot(weights, logprobs))
        if missing and self._file is not None:
            storage.write_atomically(self._file, storage.encode(self._sums))


def _key(datum: Datum) -> str:
    """The same for the same tokens of which the same are learned."""
    parts = [whole(datum).to_ints(), datum.loss_fn_inputs["weights"].tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def whole(datum: Datum) -> ModelInput:
    """Its tokens with the last one that it predicts."""
    last = datum.loss_fn_inputs["target_tokens"].tolist()[-1]
    return ModelInput.from_ints([*datum.model_input.to_ints(), last])


def logprobs_of(result: ForwardBackwardResult) -> list[torch.Tensor]:
    """Of each datum's targets, float32 [T]."""
    return [output["logprobs"].to_torch() for output in result.loss_fn_outputs]
