"""Why there is no TLS connection: it was ended, which another attempt may mend, or it is not trusted."""

import ssl
from typing import Any

from urllib3.exceptions import HTTPError, ProtocolError, SSLError

_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)


def failed_handshake(refusal: Any) -> HTTPError:
    """What urllib3 raised. The clients that are generated for Kubernetes and Kubeflow Pipelines make of each SSLError a
    `refusal`, an ApiException without status and body. A connection that was ended is no matter of certificates."""
    words = " ".join(str(refusal.reason)[:500].split())
    met = refusal.__context__
    ended = isinstance(met, SSLError) and any(isinstance(each, _ENDED) for each in met.args)
    return ProtocolError(words) if ended else SSLError(words)
