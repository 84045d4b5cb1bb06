"""MLflow: a run of an experiment, found again by the run's id."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import field_validator

from latentac.config import extensions

_RUN_TAG = "latentac.run"
_MAX_PARAMS = 100  # of one call
_MAX_VALUE = 6000  # characters
_SQLITE = "sqlite:///"
_NO_FOLDERS = ("databricks", "databricks-uc", "uc")


class MLflow:
    """Metrics, parameters and images of a run, through MLflow's client."""

    class Settings(extensions.Settings):
        tracking_uri: str | None = None
        """URL of a server, `sqlite:///file.db`, or a folder (MLflow then requires MLFLOW_ALLOW_FILE_STORE=true). A
        relative path starts at the output folder. By default MLFLOW_TRACKING_URI. User name and password come from
        MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
        experiment: str | None = None
        """Name of the experiment, which is created if it is missing. By default MLFLOW_EXPERIMENT_NAME, else
        `latentac`."""
        images: bool = True
        """Whether images are also sent."""

        @field_validator("tracking_uri")
        @classmethod
        def _usable(cls, uri: str | None) -> str | None:
            parts = urlsplit(uri) if uri else None
            if parts and (parts.password or (parts.scheme.startswith("http") and "@" in str(uri))):
                raise ValueError("has a password, which would appear in every report: use MLFLOW_TRACKING_PASSWORD")
            if uri and uri.startswith(_SQLITE) and not all(map(importlib.util.find_spec, ("sqlalchemy", "alembic"))):
                raise ValueError("needs packages that are not installed: pip install sqlalchemy alembic")
            return uri

    def __init__(self, settings: Settings, folder: Path) -> None:
        import logging
        import os

        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs a line for each repetition
        # A server that is down is asked for seconds, not for the client's minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._settings = settings
        self.address = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        uri, self._artifacts = _placed(settings.tracking_uri, folder.parent)
        self._client = MlflowClient(uri)
        self._experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "latentac"
        self._id, self._known = "", set[int]()

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        client = self._client
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment, self._artifacts)
        before = client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run}'", max_results=1)
        if before:
            self._id = before[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            history = client.get_metric_history(self._id, "reward/reward_mean")
            self._known = {metric.step for metric in history}
            return
        from mlflow.entities import Param

        self._id = client.create_run(experiment, tags={_RUN_TAG: run}, run_name=run).info.run_id
        params = [Param(name, str(value)[:_MAX_VALUE]) for name, value in settings.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        import time

        from mlflow.entities import Metric

        # MLflow keeps every value that it gets for a step: an iteration that is done again is sent once.
        if "reward/reward_mean" in scalars and step in self._known:
            return
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in scalars.items()])

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        if self._settings.images and step not in self._known:
            self._client.log_image(self._id, image, key=name, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _placed(uri: str | None, output: Path) -> tuple[str | None, str | None]:
    """`uri` and, for SQLite, where images go: by default both depend on the working folder, and a run may be resumed
    from another one."""
    if uri and uri.startswith(_SQLITE):
        file = (output / uri.removeprefix(_SQLITE)).absolute()
        return f"{_SQLITE}{file}", (file.parent / "mlruns").as_uri()
    if uri and ":" not in uri and uri not in _NO_FOLDERS:
        return str((output / uri).absolute()), None
    return uri, None
