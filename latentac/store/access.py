"""Where the S3 server is and who asks it, from the environment; and what an S3 server's error codes mean.

Values are stripped: a Secret made with `kubectl create secret --from-file` ends with a line break.
"""

import os
import re
from dataclasses import dataclass, field
from enum import Enum

from latentac.system.errors import ConfigError, LatentacError, Problem, ResourceError, StoreAccessError, StoreError
from latentac.system.errors import StoreUnavailable as Unavailable

ENDPOINT, AUTHORITIES = "LATENTAC_S3_ENDPOINT", "LATENTAC_S3_CA"
KEY_ID, SECRET, TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
VARIABLES = (ENDPOINT, KEY_ID, SECRET, TOKEN, *REGIONS, AUTHORITIES)
"""Every variable that says something of the store."""

_INVISIBLE = "\ufeff\u200b"  # what editors leave at the ends of a text beside white space
_IN_A_HEADER = r"[!-~]+"


@dataclass(frozen=True)
class Access:
    """authorities: file of PEM certificates, empty where certifi's do; token: empty with lasting keys."""

    endpoint: str
    key_id: str
    secret: str = field(repr=False)
    token: str = field(repr=False)
    region: str
    authorities: str

    def environment(self) -> dict[str, str]:
        """The variables from which another process reads the same."""
        values = (self.endpoint, self.key_id, self.secret, self.token, self.region, self.authorities)
        names = (ENDPOINT, KEY_ID, SECRET, TOKEN, REGIONS[0], AUTHORITIES)
        return {name: value for name, value in zip(names, values, strict=True) if value}


def read() -> Access:
    """The access that the environment gives. Raises ConfigError that names every variable missing or unusable."""
    problems = [
        Problem(name, "", "is not set, and an s3:// store needs it", "Export it")
        for name in (ENDPOINT, KEY_ID, SECRET)
        if not _value(name)
    ]
    endpoint, (region_name, region) = _value(ENDPOINT).rstrip("/"), _first(*REGIONS)
    authorities_name, authorities = _first(AUTHORITIES, "SSL_CERT_FILE")
    if endpoint and not re.fullmatch(r"https?://[^/@?#\s]+", endpoint):
        shown = re.sub(r"//.*@", "//***@", endpoint)
        remedy = "Give http://<host>:<port> or https://<host>, without credentials and path"
        problems.append(Problem(ENDPOINT, shown, "is not the address of a server", remedy))
    for name, pattern in ((KEY_ID, _IN_A_HEADER), (SECRET, None), (TOKEN, _IN_A_HEADER)):
        problems += _unusable(name, pattern)
    if region and not re.fullmatch(r"[A-Za-z0-9_.-]+", region):
        problems.append(
            Problem(region_name, region, "is not the name of a region", "Correct it, for example us-east-1")
        )
    if authorities and not os.path.isfile(authorities):
        remedy = "Name a file of PEM certificates, or unset it"
        problems.append(Problem(authorities_name, authorities, "is not a file", remedy))
    if problems:
        raise ConfigError(problems)
    return Access(endpoint, _value(KEY_ID), _value(SECRET), _value(TOKEN), region or "us-east-1", authorities)


def _value(name: str) -> str:
    return os.environ.get(name, "").strip().strip(_INVISIBLE).strip()


def _first(*names: str) -> tuple[str, str]:
    """The first of the variables that says something, and what it says; the first one and nothing if none does."""
    return next(((name, value) for name in names if (value := _value(name))), (names[0], ""))


def _unusable(name: str, pattern: str | None) -> list[Problem]:
    """A character in a credential that cannot be sent, or cannot be seen; the credential itself is never shown."""
    value = _value(name)
    for place, character in enumerate(value, 1):
        if not character.isprintable() or (pattern and not re.fullmatch(pattern, character)):
            problem = f"has U+{ord(character):04X} as character {place} of {len(value)}, which no such value has"
            return [Problem(name, "***", problem, "Export the variable again, with only the value, on one line")]
    return []


class Kind(Enum):
    """What an S3 error code asks of whoever reads it: the error to raise, what is wrong, the remedy."""

    CREDENTIALS = (
        StoreAccessError,
        "it does not know these credentials",
        f"Check {KEY_ID} and {SECRET}, and {TOKEN}, which only temporary keys have",
    )
    EXPIRED = (
        StoreAccessError,
        "these credentials are no longer good",
        f"Get new ones, export {KEY_ID}, {SECRET} and {TOKEN}, and resume the run",
    )
    CLOCK = (
        StoreAccessError,
        "the clocks of this machine and of the server differ",
        "Set this machine's clock (NTP), then resume the run",
    )
    RIGHTS = (
        StoreAccessError,
        "it refuses access",
        f"Check {KEY_ID}, {SECRET}, {REGIONS[0]} and this user's rights on the bucket",
    )
    REGION = (
        StoreAccessError,
        "the bucket is in another place",
        f"Set {REGIONS[0]} to the bucket's region, and {ENDPOINT} to that region's server",
    )
    BUCKET = (StoreAccessError, "there is no such bucket", "Make it, or correct the name in the store's URL")
    LACKS = (
        StoreError,
        "it lacks this operation",
        f"Use another S3 server, or correct {ENDPOINT}: what answers there may not be the S3 service",
    )
    FULL = (ResourceError, "it has no room left", "Free space there or raise the quota, or use another store")
    LATER = (Unavailable, "it cannot answer now", "Wait and run again, or check the server's health")
    OTHER = (StoreError, "it refuses the request", "Check the store's URL and the run's name")

    def __init__(self, error: type[LatentacError], problem: str, remedy: str) -> None:
        self.error, self.problem, self.remedy = error, problem, remedy


# By the error codes of Amazon's S3 and STS, and what MinIO and Ceph add to them.
_CODES = {
    Kind.CREDENTIALS: "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken InvalidTokenId InvalidClientTokenId "
    "UnrecognizedClientException InvalidSecurity AuthFailure MissingSecurityHeader MissingSecurityElement "
    "MissingAuthenticationToken MissingAuthenticationTokenException CredentialsNotSupported IncompleteSignature "
    "BadRequest",  # to a HEAD, which gives no reason: most often credentials
    Kind.EXPIRED: "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired ExpiredSignature",
    Kind.CLOCK: "RequestTimeTooSkewed RequestInTheFuture",
    Kind.REGION: "AuthorizationHeaderMalformed PermanentRedirect TemporaryRedirect Redirect IncorrectEndpoint "
    "IllegalLocationConstraintException InvalidLocationConstraint InvalidRegion",
    Kind.BUCKET: "NoSuchBucket",
    Kind.LACKS: "NotImplemented MethodNotAllowed NotSupported UnsupportedOperation UnsupportedSignature "
    "FeatureNotEnabled XNotImplemented",
    Kind.FULL: "XMinioStorageFull XMinioAdminBucketQuotaExceeded QuotaExceeded StorageFull InsufficientCapacity",
    # Also what a restarted server forgot (NoSuchUpload) and what was damaged on its way: the same again may work.
    Kind.LATER: "SlowDown SlowDownRead SlowDownWrite ServiceUnavailable InternalError RequestTimeout Busy Throttling "
    "RequestTimeoutException ThrottlingException RequestThrottled RequestLimitExceeded TooManyRequests "
    "BandwidthLimitExceeded OperationAborted ConditionalRequestConflict XMinioServerNotInitialized "
    "XMinioBackendDown NoSuchUpload BadDigest IncompleteBody XAmzContentSHA256Mismatch",
}
_KINDS = {code: kind for kind, codes in _CODES.items() for code in codes.split()}
_STATUSES = {
    **dict.fromkeys((301, 302, 307, 308), Kind.REGION),
    **dict.fromkeys((401, 403), Kind.RIGHTS),
    **dict.fromkeys((405, 501, 505), Kind.LACKS),
    **dict.fromkeys((408, 425, 429, 500, 502, 503, 504, 509), Kind.LATER),
    507: Kind.FULL,
}


def kind_of(code: str, status: int) -> Kind:
    """The code decides; where it is not known, the HTTP status, of which only some say that waiting helps."""
    return _KINDS.get(code) or _STATUSES.get(status) or (Kind.LATER if 520 <= status < 600 else Kind.OTHER)
