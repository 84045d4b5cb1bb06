"""The API of a Kubeflow Pipelines installation as the commands use it; every refusal is one of our errors.

KF_PIPELINES_ENDPOINT     the address, where --host does not name it
LATENTAC_KFP_TOKEN        a bearer token; else the file of KF_PIPELINES_SA_TOKEN_PATH (in a pod) is read
LATENTAC_KFP_COOKIE       a session's cookie, for an installation behind a login page
"""

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import kfp_server_api as api
from urllib3.exceptions import HTTPError, SSLError

from latentac.system.errors import ClusterError, ClusterUnavailable, ConfigError, Problem
from latentac.system.reading import parse_json, read_given
from latentac.system.tls import failed_handshake
from latentac.system.waiting import Bounds, within

ENDPOINT, TOKEN, TOKEN_FILE = "KF_PIPELINES_ENDPOINT", "LATENTAC_KFP_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH"
COOKIE = "LATENTAC_KFP_COOKIE"
MAX_PARAMETERS = 100_000
"""Bytes. They come on a step's command line, which takes little more."""

_RETRIES = 3
_BOUNDS = Bounds()
_TRANSIENT = frozenset({429, 502, 503, 504})
_PAGE = 100
_MOST_PAGES = 1000
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Order:
    """A run to start. version: ids of pipeline and version; account: the service account that it runs under;
    experiment: name; root: URL of KFP's own artifacts, "" for KFP's default."""

    name: str
    version: tuple[str, str]
    parameters: Mapping[str, Any]
    account: str
    experiment: str
    root: str


class _Client(api.ApiClient):
    """The package's own client turns an error of TLS into one without a body, and fails when it decodes this body."""

    def request(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().request(*arguments, **options)
        except api.ApiException as error:
            if error.status:
                raise
            raise failed_handshake(error) from None


class Service:
    """Kubeflow Pipelines at `host`. namespace: of the user, where it serves many, else empty.

    Every method may raise ClusterError (refused) and ClusterUnavailable (no answer, retries included). Each question
    ends within `bounds.total_seconds`; a list has at most 1000 pages.
    """

    def __init__(self, host: str, namespace: str = "", authorities: str = "", bounds: Bounds = _BOUNDS) -> None:
        if not host.startswith(("http://", "https://")):
            remedy = f"Give its address, as in http://localhost:8888, or export {ENDPOINT}."
            raise ConfigError([Problem("--host", host, "is not the address of Kubeflow Pipelines", remedy)])
        self.host, self.namespace, self._bounds = host.rstrip("/"), namespace, bounds
        configuration = api.Configuration(host=self.host)
        configuration.retries = False  # ours, which know what may be asked twice
        if authorities:
            configuration.ssl_ca_cert = authorities
        if token := _token():
            configuration.api_key["authorization"] = token
            configuration.api_key_prefix["authorization"] = "Bearer"
        self._client = _Client(configuration, cookie=_secret(COOKIE) or None)
        self._pipelines, self._uploads = (
            api.PipelineServiceApi(self._client),
            api.PipelineUploadServiceApi(self._client),
        )
        self._runs, self._recurring = api.RunServiceApi(self._client), api.RecurringRunServiceApi(self._client)
        self._experiments = api.ExperimentServiceApi(self._client)
        self._own: dict[str, Any] = {"namespace": namespace} if namespace else {}

    def upload(self, file: Path, name: str, version: str) -> tuple[str, str, bool]:
        """Upload `file` as `version` of the pipeline `name`, unless it is there. Returns both ids, and whether it was
        uploaded."""
        pipeline = self._pipeline(name)
        found = self._version(pipeline, version)
        if found is not None:
            return pipeline, found, False
        try:
            made = self._call(
                f"upload version {version}",
                self._uploads.upload_pipeline_version,
                str(file),
                name=version,
                pipelineid=pipeline,
            )
        except ClusterError as error:
            found = self._version(pipeline, version) if error.status == 409 else None
            if found is None:
                raise
            return pipeline, found, False  # somebody else uploaded it meanwhile
        return pipeline, str(made.pipeline_version_id), True

    def submit(self, order: Order) -> str:
        """Start a run; its id."""
        body = api.V2beta1Run(**self._ordered(order))
        return str(self._once(f"start {order.name}", self._runs.run_service_create_run, body).run_id)

    def schedule(self, order: Order, cron: str) -> str:
        """Start a run at every time that `cron` names (six fields, seconds first), one at a time; its id."""
        body = api.V2beta1RecurringRun(
            **self._ordered(order),
            max_concurrency="1",
            no_catchup=True,
            mode="ENABLE",
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
        )
        made = self._once(f"schedule {order.name}", self._recurring.recurring_run_service_create_recurring_run, body)
        return str(made.recurring_run_id)

    def run(self, run_id: str) -> api.V2beta1Run:
        return self._call(f"run {run_id}", self._runs.run_service_get_run, run_id)

    def runs(self, count: int) -> list[api.V2beta1Run]:
        """The newest `count` runs of this namespace."""
        options = self._own
        listed = self._call(
            "list runs", self._runs.run_service_list_runs, page_size=count, sort_by="created_at desc", **options
        )
        return list(listed.runs or [])

    def terminate(self, run_id: str) -> None:
        self._call(f"run {run_id}", self._runs.run_service_terminate_run, run_id)

    def nodes(self, run_id: str) -> dict[str, dict[str, Any]]:
        """Argo's nodes of the run by id. Why one failed stands here alone: the newer API leaves every error empty."""
        found = self._call(f"run {run_id}", self._get, f"/apis/v1beta1/runs/{run_id}")
        text = ((found or {}).get("pipeline_runtime") or {}).get("workflow_manifest") or "{}"
        nodes = (parse_json(text).get("status") or {}).get("nodes") or {}
        return dict(nodes)

    def _get(self, path: str, **options: Any) -> Any:
        return self._client.call_api(
            path, "GET", response_type="object", auth_settings=["Bearer"], _return_http_data_only=True, **options
        )

    def _pipeline(self, name: str) -> str:
        where = f"pipeline {name}"
        options = self._own
        try:
            found = self._call(where, self._pipelines.pipeline_service_get_pipeline_by_name, name, **options)
        except ClusterError as error:
            if error.status != 404:
                raise
            body = api.V2beta1Pipeline(name=name, display_name=name, **options)
            found = self._call(where, self._pipelines.pipeline_service_create_pipeline, body)
        return str(found.pipeline_id)

    def _version(self, pipeline: str, version: str) -> str | None:
        for page in self._pages(self._pipelines.pipeline_service_list_pipeline_versions, pipeline):
            for found in page.pipeline_versions or []:
                if version in (found.display_name, found.name):
                    return str(found.pipeline_version_id)
        return None

    def _ordered(self, order: Order) -> dict[str, Any]:
        """The fields that a run and a recurring run have in common."""
        return {
            "display_name": order.name,
            "experiment_id": self._experiment(order.experiment),
            "pipeline_version_reference": _reference(order.version),
            "runtime_config": _configured(order.parameters, order.root),
            "service_account": order.account,
        }

    def _experiment(self, name: str) -> str:
        options = self._own
        for page in self._pages(self._experiments.experiment_service_list_experiments, **options):
            for found in page.experiments or []:
                if found.display_name == name:
                    return str(found.experiment_id)
        body = api.V2beta1Experiment(display_name=name, **options)
        where = f"experiment {name}"
        return str(self._call(where, self._experiments.experiment_service_create_experiment, body).experiment_id)

    def _pages(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
        token, seen = "", set[str]()
        while len(seen) < _MOST_PAGES:
            page = self._call("list", method, *arguments, page_size=_PAGE, page_token=token, **options)
            yield page
            token = page.next_page_token
            if not token:
                return
            if token in seen:
                break
            seen.add(token)
        remedy = "Check that --host is Kubeflow Pipelines, and delete old versions and experiments"
        raise ClusterError(f"{self.host}, list", f"its list has no end after {len(seen)} pages of {_PAGE}", remedy)

    def _once(self, where: str, method: Callable[..., Answer], *arguments: Any) -> Answer:
        """For what must not be done twice: no answer is not proof that it was not done."""
        return self._call(where, method, *arguments, retries=0)

    def _call(
        self, where: str, method: Callable[..., Answer], *arguments: Any, retries: int = _RETRIES, **options: Any
    ) -> Answer:
        began, seconds = time.monotonic(), self._bounds.answer_seconds
        for attempt in range(retries + 1):
            try:
                return within(seconds, lambda: method(*arguments, _request_timeout=(seconds, seconds), **options))
            except api.ApiException as error:
                refusal = self._refused(where, error)
                if error.status not in _TRANSIENT:
                    raise refusal from None
                last: Exception = refusal
            except SSLError as error:
                remedy = "Name the file of its certificate authority with --ca"
                raise ClusterError(self.host, f"there is no trusted TLS connection to it ({error})", remedy) from None
            except (HTTPError, OSError) as error:
                last = error
            pause = 0.3 * 2**attempt * random.uniform(0.5, 1.5)
            if attempt == retries or time.monotonic() + pause > began + self._bounds.retry_seconds:
                break
            time.sleep(pause)
        remedy = "Check --host, and that it can be reached from here: kubectl port-forward svc/ml-pipeline 8888"
        waited = f"given up after {time.monotonic() - began:.1f} s"
        problem = f"Kubeflow Pipelines does not answer ({last}), {waited}"
        raise ClusterUnavailable(f"{self.host}, {where}", problem, remedy) from last

    def _refused(self, where: str, error: api.ApiException) -> ClusterError:
        try:
            body = parse_json(error.body)
            words = str(body.get("error_message") or body.get("message") or body.get("error"))
        except (TypeError, ValueError, AttributeError):  # a proxy's page
            words = str(error.reason)
        status = int(error.status or 0)
        remedy = {
            401: f"Export a valid token in {TOKEN}, or a session's cookie in {COOKIE}",
            403: f"Ask for the right, or name your namespace with --namespace; the token is that of {TOKEN}",
            404: "See what there is with `latentac pipeline runs`",
        }.get(status, "Correct the request")
        return ClusterError(f"{self.host}, {where}", f"{status} {' '.join(words.split())[:500]}", remedy, status)


def _reference(version: tuple[str, str]) -> api.V2beta1PipelineVersionReference:
    return api.V2beta1PipelineVersionReference(pipeline_id=version[0], pipeline_version_id=version[1])


def _configured(parameters: Mapping[str, Any], root: str) -> api.V2beta1RuntimeConfig:
    size = len(json.dumps(dict(parameters)))
    if size > MAX_PARAMETERS:
        remedy = "Put large things into the store and name them."
        raise ConfigError([Problem("--config", f"{size} bytes", f"parameters hold {MAX_PARAMETERS}", remedy)])
    return api.V2beta1RuntimeConfig(parameters=dict(parameters), **({"pipeline_root": root} if root else {}))


def _token() -> str:
    if token := _secret(TOKEN):
        return token
    file = os.environ.get(TOKEN_FILE)
    try:
        token = read_given(Path(file)).strip() if file else ""
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "it is not text") or error
        raise ConfigError([Problem(TOKEN_FILE, file, f"cannot be read: {reason}", "Unset it.")]) from None
    if not (token.isascii() and token.isprintable()):
        raise ConfigError([Problem(TOKEN_FILE, file, "holds more than a token", "Unset it.")])
    return token


def _secret(name: str) -> str:
    """What the variable says, without the line break of a file. Raises ConfigError where no header can hold it."""
    value = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[ -~]*", value):
        problem, remedy = (
            "has a character that cannot be sent",
            "Export the variable again, with only the value, on one line.",
        )
        raise ConfigError([Problem(name, "***", problem, remedy)])
    return value
