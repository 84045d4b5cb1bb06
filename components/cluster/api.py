"""A Kubernetes API server as the steps use it: plain objects in and out, few verbs, every refusal an error of ours.

Objects are dictionaries as in YAML, for kinds of the server's own and custom ones alike. Which verbs on which
resources are called, each service account is granted in the chart, and nothing more.
"""

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from kubernetes import client, config
from urllib3.exceptions import HTTPError, SSLError

from latentac.system.errors import ClusterError, ClusterUnavailable, ConfigError, Problem, describe
from latentac.system.reading import parse_json
from latentac.system.tls import failed_handshake
from latentac.system.waiting import Bounds, TimeUp, within

MANAGER = "latentac"
"""Our field manager in server-side apply."""

_RETRIES = 5
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 60.0
_LOGIN_SECONDS = 120.0
"""For a program that the kubeconfig names to get credentials: a person may have to log in."""

_BOUNDS = Bounds()
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
_LINE_BYTES = 2**20
"""Of a log, whose container may write no line's end."""
_UNKNOWN_FIELD = "field not declared in schema"
_MOST_CHARACTERS = 1000
"""Of what a server, or a proxy before it, says. Pod Security's refusal of a pod has 800."""


@dataclass(frozen=True)
class Kind:
    """A resource as it stands in a URL; `group` is empty for the core API."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, "namespaces", namespace, self.plural, *filter(None, (name, subresource))]
        return "/".join([parts[0], *(quote(part, safe="") for part in parts[1:])])


PODS = Kind("", "v1", "pods")
EVENTS = Kind("", "v1", "events")
CONFIG_MAPS = Kind("", "v1", "configmaps")
DEPLOYMENTS = Kind("apps", "v1", "deployments")
VOLCANO_JOBS = Kind("batch.volcano.sh", "v1alpha1", "jobs")
INFERENCE_SERVICES = Kind("serving.kserve.io", "v1beta1", "inferenceservices")
SERVING_RUNTIMES = Kind("serving.kserve.io", "v1alpha1", "servingruntimes")
HTTP_ROUTES = Kind("gateway.networking.k8s.io", "v1", "httproutes")


class BoundedClient(client.ApiClient):
    """Every call ends, also those of other libraries that are given this client: on its own it would wait for ever."""

    def __init__(self, settings: client.Configuration, bounds: Bounds) -> None:
        settings.retries = False  # urllib3 would try each of our attempts four times
        super().__init__(settings)
        self._seconds = bounds.answer_seconds

    def call_api(self, *arguments: Any, _request_timeout: Any = None, **options: Any) -> Any:
        """As the class above does. With `_preload_content=False` only the answer's head is waited for.

        Raises TimeUp too.
        """
        # A pair, for the client takes no notice of a single float.
        options["_request_timeout"] = _request_timeout or (min(_CONNECT_SECONDS, self._seconds), self._seconds)
        ask = super().call_api
        return within(self._seconds, lambda: ask(*arguments, **options))

    def request(self, *arguments: Any, **options: Any) -> Any:
        """Raises what urllib3 does of TLS. The package makes a refusal of it, which has no status."""
        try:
            return super().request(*arguments, **options)
        except client.ApiException as error:
            if error.status:
                raise
            raise failed_handshake(error) from None


class Api:
    """One namespace of one API server. Every method may raise ClusterError (refused) and ClusterUnavailable.

    A method that returns has its answer within `bounds.total_seconds`.
    """

    def __init__(self, settings: client.Configuration, namespace: str, bounds: Bounds = _BOUNDS) -> None:
        self.client, self.namespace, self.bounds = BoundedClient(settings, bounds), namespace, bounds

    def get(self, kind: Kind, name: str, subresource: str = "") -> dict[str, Any] | None:
        """The object, or None where there is none."""
        return self._call("GET", kind.path(self.namespace, name, subresource), missing=True)

    def find(self, kind: Kind, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """The objects that match both selectors."""
        query = urlencode({"labelSelector": labels, "fieldSelector": fields})
        found = self._call("GET", f"{kind.path(self.namespace)}?{query}")
        return list(found["items"]) if found else []

    def create(self, kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._call("POST", kind.path(self.namespace), dict(body)) or {}

    def apply(self, kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
        """Server-side apply: fields that we set before and no longer name go away, those of others stay."""
        path = kind.path(self.namespace, body["metadata"]["name"])
        path += f"?fieldManager={MANAGER}&force=true&fieldValidation=Strict"
        return self._call("PATCH", path, dict(body), "application/apply-patch+yaml") or {}

    def delete(self, kind: Kind, name: str) -> None:
        """Delete with its dependents; nothing if it is gone already."""
        self._call("DELETE", f"{kind.path(self.namespace, name)}?propagationPolicy=Background", missing=True)

    def log(self, pod: str, container: str, *, tail: int, previous: bool = False) -> list[str]:
        """The last lines of a container's log, of a megabyte at most; empty where it has none (yet, or any more)."""
        bound = {"tailLines": tail, "limitBytes": _LINE_BYTES}
        query = urlencode({"container": container, **bound, "previous": str(previous).lower()})
        try:
            text = self._call("GET", f"{PODS.path(self.namespace, pod, 'log')}?{query}", missing=True, text=True)
        except ClusterError as error:
            if error.status == 400:  # the container has not started
                return []
            raise
        return str(text or "").splitlines()

    def follow(self, pod: str, container: str, *, since: str = "") -> Iterator[str]:
        """The container's log as it is written, `<RFC 3339 time> <text>` a line, until the container ends.

        since: leave out what is older, RFC 3339 in whole seconds. A line of more than a megabyte comes in pieces, of
        which the first has the time. Nothing where the container has not started. Raises ClusterUnavailable where the
        stream breaks off, and after a minute of silence: follow it again then.
        """
        query = {"container": container, "follow": "true", "timestamps": "true"}
        path = (
            f"{PODS.path(self.namespace, pod, 'log')}?{urlencode({**query, **({'sinceTime': since} if since else {})})}"
        )
        with self.translated("GET", path):
            try:
                response = self.client.call_api(
                    path,
                    "GET",
                    header_params={"Accept": "*/*"},
                    auth_settings=["BearerToken"],
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(_CONNECT_SECONDS, _SILENCE_SECONDS),
                )
            except client.ApiException as error:
                if error.status in (400, 404):
                    return
                raise
            try:
                rest = b""
                for data in response.stream():
                    *lines, rest = (rest + data).split(b"\n")
                    if len(rest) > _LINE_BYTES:
                        lines, rest = [*lines, rest], b""
                    yield from (line.decode(errors="replace") for line in lines)
            finally:
                response.close()

    @contextmanager
    def translated(self, method: str, path: str) -> Iterator[None]:
        """Errors of calls that another library makes with our client, as ours. Nothing is called again."""
        try:
            yield
        except client.ApiException as error:
            refusal = _refused(method, path, error)
            if error.status not in _TRANSIENT:
                raise refusal from None
            raise self._unavailable(refusal, f"{method} {path.partition('?')[0]}") from refusal
        except SSLError as error:
            raise self._untrusted(error) from None
        except (HTTPError, OSError) as error:
            raise self._unavailable(error, f"{method} {path.partition('?')[0]}") from error

    def _unavailable(self, error: Exception, asked: str, waited: str = "") -> ClusterUnavailable:
        host = self.client.configuration.host
        problem = f"the API server does not answer {asked} ({_short(error)}){waited}"
        return ClusterUnavailable(host, problem, "Check that it can be reached from here, and try again later")

    def _untrusted(self, error: SSLError) -> ClusterError:
        settings = self.client.configuration
        named = f"certificate authority {settings.ssl_ca_cert or 'of certifi'}"
        named += f", own certificate {settings.cert_file}" if settings.cert_file else ""
        problem = f"there is no trusted TLS connection to the API server ({error}; {named})"
        remedy = "Correct server, certificate-authority and client-certificate in the kubeconfig"
        return ClusterError(settings.host, problem, remedy)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        *,
        missing: bool = False,
        text: bool = False,
    ) -> Any:
        began = time.monotonic()
        for attempt in range(_RETRIES + 1):
            try:
                answer = self.client.call_api(
                    path,
                    method,
                    header_params={"Content-Type": content_type, "Accept": "*/*" if text else "application/json"},
                    body=body,
                    auth_settings=["BearerToken"],
                    response_type="object",
                    _preload_content=not text,  # the client would take a log of digits for a number
                    _return_http_data_only=True,
                )
                return self._text(answer) if text else answer
            except client.ApiException as error:
                if error.status == 404 and missing:
                    return None
                refusal = _refused(method, path, error)
                if error.status not in _TRANSIENT or _UNKNOWN_FIELD in _message(error):
                    raise refusal from None
                last: Exception = refusal
            except SSLError as error:
                raise self._untrusted(error) from None
            except (HTTPError, OSError) as error:
                last = error
            pause = 0.2 * 2**attempt * random.uniform(0.5, 1.5)
            if attempt == _RETRIES or time.monotonic() + pause > began + self.bounds.retry_seconds:
                break
            time.sleep(pause)
        waited = f", given up after {time.monotonic() - began:.1f} s"
        raise self._unavailable(last, f"{method} {path.partition('?')[0]}", waited) from last

    def _text(self, response: Any) -> str:
        data: bytes = within(self.bounds.answer_seconds, lambda: response.data)
        return data.decode(errors="replace")


def connect(namespace: str) -> Api:
    """The cluster around this pod, else the kubeconfig's current context. Raises ConfigError if there is neither."""
    settings, named = client.Configuration(), os.environ.get("KUBECONFIG")
    try:
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        try:
            # The package keeps the variable as it was when it was imported. It may run a program, or ask a server.
            within(_LOGIN_SECONDS, lambda: config.load_kube_config(named, client_configuration=settings))
        except TimeUp as error:
            problem = f"what it names gives no credentials ({error})"
            remedy = "Log in with kubectl first, or correct the kubeconfig."
            raise ConfigError([Problem("KUBECONFIG", named, problem, remedy)]) from None
        except Exception as error:  # noqa: BLE001 - the package raises whatever the file's content leads to
            remedy = "Export KUBECONFIG, or run this in a pod with a service account."
            fault = f"no cluster is configured: {describe(error)}"
            raise ConfigError([Problem("KUBECONFIG", named, fault, remedy)]) from None
    return Api(settings, namespace)


def _refused(method: str, path: str, error: client.ApiException) -> ClusterError:
    """In the server's own words."""
    message = _message(error)
    remedy = "Correct the object"
    if error.status == 403 and "admission webhook" not in message and "violates PodSecurity" not in message:
        remedy = "Grant the right to this service account: see the chart's Roles"
    elif error.status == 401:
        remedy = "Check the service account's token or the kubeconfig"
    elif error.status == 404:
        remedy = "Install what serves that resource: see the chart's prerequisites"
    return ClusterError(f"{method} {path.partition('?')[0]}", f"{error.status} {_short(message)}", remedy, error.status)


def _message(error: client.ApiException) -> str:
    """That of the Status object which the server sent, or else what it sent."""
    content = error.body or str(error.reason)  # bytes, where a log was asked for
    text = content if isinstance(content, str) else content.decode(errors="replace")
    try:
        return str(parse_json(text)["message"])
    except (TypeError, ValueError, KeyError):
        return text


def _short(words: object) -> str:
    """In one line of few words."""
    return " ".join(str(words)[: 10 * _MOST_CHARACTERS].split())[:_MOST_CHARACTERS]
