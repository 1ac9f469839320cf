"""`Published`: what clients of one set of weights have in common, whether they sample or score."""

from __future__ import annotations

import weakref
from contextlib import suppress

from weaver.client.session import RELEASED, Session
from weaver.errors import ClosedError, NotFoundError
from weaver.protocol import ReleaseSampler, SamplerOpened
from weaver.tokenizers import PreTrainedTokenizer
from weaver.values import table_html


class Published:
    """Where the weights have no name of their own, they go with the client: when it is closed, or
    soon after nothing refers to it any more."""

    def __init__(self, session: Session, opened: SamplerOpened, *, owned: bool) -> None:
        self._session = session
        self._closed = False
        self._unneeded = weakref.finalize(self, session.release_later, opened.sampler_id)
        self._unneeded.atexit = False
        if not owned:
            self._unneeded.detach()
        self.sampler_id = opened.sampler_id
        self.model_info = opened.model
        self.base_model = opened.model.name
        self.weights_version = opened.weights_version
        """The optimizer step of the weights; 0 for a base model."""

    def __repr__(self) -> str:
        of = f"{self.sampler_id} of {self.base_model}, step {self.weights_version}"
        return f"<{type(self).__name__}: {of}>"

    def _repr_html_(self) -> str:
        """In notebooks: whose weights they are, and of which step."""
        return table_html(
            {
                "sampler_id": self.sampler_id,
                "base_model": self.base_model,
                "weights_version": self.weights_version,
                "context_length": self.model_info.context_length,
                "state": "closed" if self._closed else "open",
            }
        )

    async def close(self) -> None:
        """Ends this client, and weights that have no name of their own; checkpoints stay.

        What is on its way is finished. Using those weights again, from any client, ends with
        `CheckpointNotFoundError`.
        """
        self._closed = True
        if self._unneeded.detach():
            with suppress(NotFoundError):  # it made room for newer ones
                await self._session.submit(ReleaseSampler(sampler_id=self.sampler_id), RELEASED)

    async def get_tokenizer(self) -> PreTrainedTokenizer:
        """The model's tokenizer, a transformers one; loaded once per client."""
        return await self._session.get_tokenizer(self.base_model)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this client was closed.", hint="Make another one.")
