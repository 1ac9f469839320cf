"""Addresses of servers, checked before anything is sent there, and hints where none answers there.

Called by `HttpService`.
"""

from __future__ import annotations

import traceback
from urllib.parse import SplitResult, urlsplit

from weaver.errors import ServiceConnectionError

NOT_RUNNING = "Is the server running? `weaver serve` starts one; check WEAVER_BASE_URL."


def parse_address(base_url: str) -> SplitResult:
    """The parts of an address to which paths can be added.

    Raises:
        ServiceConnectionError: it has no host or a port that cannot be, or more than that.
    """
    try:
        parts = urlsplit(base_url.rstrip("/"))
        wrong = "" if parts.hostname and parts.port != 0 else "it names no host"
    except ValueError as error:
        raise _refused(base_url, f"is no address: {error}") from None
    if wrong or parts.scheme not in ("http", "https"):
        raise _refused(
            base_url, f"is no address: {wrong or 'it begins with no http:// or https://'}"
        )
    if parts.username is not None:  # the password is not shown, and would take the key's place
        raise _refused(f"an address at {parts.hostname}", "has a user's name; keys are sent apart")
    if parts.query or parts.fragment:
        raise _refused(base_url, "ends with more than a path")
    if parts.path.endswith("/v1"):
        raise _refused(base_url, "has /v1 at its end, which the client adds itself")
    return parts


def tls_hint(error: Exception) -> str:
    """What to do about an error of TLS, which trying again does not mend; "" of any other."""
    chain = "".join(traceback.format_exception(error))
    if "Hostname mismatch" in chain or "IP address mismatch" in chain:
        return "The certificate is for another name: use that in the address."
    if "CERTIFICATE_VERIFY_FAILED" in chain:
        return "Its authority is not known: SSL_CERT_FILE names a file of those to trust (PEM)."
    if "WRONG_VERSION_NUMBER" in chain or "RECORD_LAYER_FAILURE" in chain:
        return "The server speaks no TLS: try http:// in place of https://."
    return ""


def _refused(address: str, why: str) -> ServiceConnectionError:
    return ServiceConnectionError(f"{address} {why}.", hint="Such as http://127.0.0.1:8000.")
