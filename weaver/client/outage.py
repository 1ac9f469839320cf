"""`Outage`: how long `HttpService` goes on asking a server that does not answer."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

import anyio

from weaver import errors
from weaver.client.address import NOT_RUNNING, tls_fault

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class ComesBackError(Exception):
    """An answer that will be another one after a while."""

    def __init__(self, error: errors.WeaverError, after_s: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


class Outage:
    """Pauses between attempts: doubling, jittered, capped, and never beyond the deadline."""

    def __init__(self, address: str, longest_s: float) -> None:
        self._address = address
        self._longest_s = longest_s
        self.over()

    def over(self) -> None:
        self.attempts = 0
        self._began: float | None = None

    async def pause(self, error: httpx.TransportError | ComesBackError) -> None:
        """Waits before the next attempt.

        Raises:
            ServiceConnectionError: there is no time left for one.
            WeaverError: nor is there, and the server had said why.
        """
        now = anyio.current_time()
        if self._began is None:
            self._began = now
            logger.info("%s: %r; trying again for %g s", self._address, error, self._longest_s)
        pause_s = min(FIRST_PAUSE_S * 2**self.attempts, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        if isinstance(error, ComesBackError):
            pause_s = max(pause_s, error.after_s)
        fault = tls_fault(error)
        if fault or now + pause_s > self._began + self._longest_s:
            if isinstance(error, ComesBackError):
                raise error.error
            why, hint = fault or (str(error) or type(error).__name__, NOT_RUNNING)
            message = f"{self._address} cannot be reached: {why}."
            raise errors.ServiceConnectionError(message, hint=hint) from None
        self.attempts += 1
        await anyio.sleep(pause_s)
