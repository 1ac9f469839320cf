"""Addresses of servers, checked before anything is sent there, and hints where none answers there.

Called by `HttpService`.
"""

from __future__ import annotations

import ssl
from urllib.parse import SplitResult, urlsplit

from weaver.errors import ServiceConnectionError, WeaverError

NOT_RUNNING = "Is the server running? `weaver serve` starts one; check WEAVER_BASE_URL."
OTHER_NAME = "The certificate is for another name: use that in the address."
UNKNOWN_AUTHORITY = (
    "Its authority is not known: SSL_CERT_FILE names a file of those to trust (PEM), or "
    "SSL_CERT_DIR a folder of them, named by `openssl rehash`."
)
CERTIFICATE_HINTS = {
    9: "The certificate is not valid yet: set this machine's clock, or wait.",
    10: "The certificate has expired: renew it at the server, or set this machine's clock.",
    **dict.fromkeys((18, 19, 20, 21), UNKNOWN_AUTHORITY),
    **dict.fromkeys((62, 64), OTHER_NAME),
}
"""By OpenSSL's number of what is wrong, which stays as it is where the text does not."""


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


def tls_fault(error: BaseException) -> tuple[str, str] | None:
    """What is wrong with the server's TLS, and what to do; None where trying again may mend it.

    Each backend wraps the error of `ssl` in others, and the one of trio leaves out its text.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (OSError, WeaverError)):
        cause = cause.__cause__ or cause.__context__  # ends before an error that the caller handles
    match cause:
        case ssl.SSLCertVerificationError():
            about = CERTIFICATE_HINTS.get(cause.verify_code, "Replace the server's certificate.")
            return f"its certificate is refused: {cause.verify_message.rstrip('.')}", about
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER" | "RECORD_LAYER_FAILURE"):
            return str(cause), "The server speaks no TLS: try http:// in place of https://."
    return None


def _refused(address: str, why: str) -> ServiceConnectionError:
    return ServiceConnectionError(f"{address} {why}.", hint="Such as http://127.0.0.1:8000.")
