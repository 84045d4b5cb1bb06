"""Trackers: each number once, the reward first, the real MLflow and Weights & Biases offline, and no failure of theirs
becomes one of the run."""

import importlib.util
import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from latentac.config import extensions
from latentac.config.recipes import RECIPES
from latentac.config.schema import Config
from latentac.config.validation import resolve
from latentac.runs.hyperparameters import hyperparameters
from latentac.runs.publishing import track
from latentac.runs.reporting.metrics import of_evaluation, of_iteration
from latentac.runs.reporting.tracking import TRACKERS, Background, make_trackers, tracking
from latentac.runs.reporting.tracking.tensorboard import TensorBoard, all_but_evaluation, until
from latentac.runs.resolution import resolve_all
from latentac.store import open_store
from latentac.system.errors import ConfigError
from tests.faults import faulty
from tests.latentac.published import EVALUATION
from tests.latentac.workers import RUN, prepared, train_here

IMAGE = np.zeros((4, 4, 3), np.uint8)
OWN = "tests.latentac.test_tracking:Notebook"
HERE: list[tuple[Any, ...]] = []


class Notebook:
    """A tracker of a user's own: it remembers what it is told."""

    def __init__(self, folder: Path) -> None:
        HERE.append(("made", folder.name))

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        HERE.append(("start", run, settings["seed"]))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        HERE.append(("log", step, next(iter(scalars))))

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        HERE.append(("image", name, step))

    def finish(self) -> None:
        HERE.append(("finish",))


def fields(*tracking: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return RECIPES["shapes-unet-smoke"] | sections | {"tracking": list(tracking)}


def config(*tracking: dict[str, Any], **sections: Any) -> Config:
    return resolve(fields(*tracking, **sections))


def check(*tracking: dict[str, Any]) -> None:
    resolve_all(fields(*tracking))


def entry(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "rewards": {"redness": 0.1 * iteration},
        "reward_mean": 0.1 * iteration,
        "kl": 0.01,
        "explained_variance": [0.1, 0.2],
        "seconds": 2.0,
    }


def written(folder: Path) -> Counter[tuple[str, int]]:
    """How often each number and image is in the files, as a reader without TensorBoard's rules finds it."""
    found: Counter[tuple[str, int]] = Counter()
    for path in folder.glob("events.out.tfevents.*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            found.update((value.tag, event.step) for value in event.summary.value)
    return found


def write(folder: Path, iterations: range, kept: int) -> TensorBoard:
    """Iterations after a start at the checkpoint `kept`, as a training writes them; it is not closed, as if killed."""
    board = TensorBoard(folder, until(kept))
    for iteration in iterations:
        board.log(iteration, of_iteration(entry(iteration)))
        board.image("rollouts", iteration, IMAGE)
    board.flush()
    return board


def test_a_resumed_run_is_in_the_folder_once(tmp_path: Path) -> None:
    """Killed after iteration 5 with a checkpoint of 3, and again: each number and image is there once, 1 to 6."""
    write(tmp_path, range(1, 6), 0)
    assert write(tmp_path, range(4, 6), 3).rewritten
    assert write(tmp_path, range(5, 7), 4).rewritten
    found = written(tmp_path)
    assert set(found.values()) == {1}
    assert {step for tag, step in found if tag == "1_reward/reward_mean"} == set(range(1, 7))
    assert {step for tag, step in found if tag == "rollouts"} == set(range(1, 7))
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("1_reward/redness")] == [1, 2, 3, 4, 5, 6]
    assert read.Scalars("1_reward/redness")[-1].value == pytest.approx(0.6)


def test_a_run_that_lost_nothing_goes_on_in_another_file(tmp_path: Path) -> None:
    """Stopped at its checkpoint: what is there stays as it is, byte by byte."""
    write(tmp_path, range(1, 3), 0)
    (before,) = tmp_path.iterdir()
    content = before.read_bytes()
    time.sleep(1.1)  # their names have seconds
    board = write(tmp_path, range(3, 5), 2)
    assert not board.rewritten
    assert board.steps == {1, 2}
    assert before.read_bytes() == content
    assert set(written(tmp_path).values()) == {1}


def test_a_record_that_was_cut_off_is_no_trouble(tmp_path: Path) -> None:
    """kill -9 in the middle of a write: what is before it is read, and the run goes on."""
    write(tmp_path, range(1, 4), 0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    write(tmp_path, range(3, 5), 2)
    assert {step for _, step in written(tmp_path)} == {1, 2, 3, 4}
    assert set(written(tmp_path).values()) == {1}


def test_the_reward_comes_first(tmp_path: Path) -> None:
    """TensorBoard sorts by name: reward, evaluation, policy, critic, time."""
    board = write(tmp_path, range(1, 2), 0)
    board.log(1, of_evaluation(EVALUATION, "shapes_verifier"))
    board.flush()
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted(tag for tag, _ in written(tmp_path))))
    assert groups == ["1_reward", "2_evaluation", "3_policy", "4_critic", "5_time", "rollouts"]


def record(data: bytes, length: int | None = None) -> bytes:
    """A record of an event file, whose length need not be that of its data."""
    head = struct.pack("<Q", len(data) if length is None else length)
    crcs = (struct.pack("<I", masked_crc32c(part)) for part in (head, data))
    return head + next(crcs) + data + next(crcs)


def test_files_that_are_none_of_events_hold_no_training(tmp_path: Path) -> None:
    """A run's folder may be somebody else's: what can be read of the others is kept, and nothing is waited for."""
    write(tmp_path, range(1, 3), 0).finish()
    files = {"long": record(b"x", 2**60), "none": record(b"\xff" * 50), "text": b"x" * 1000, "empty": b""}
    for name, content in files.items():
        (tmp_path / f"events.out.tfevents.0.{name}").write_bytes(content)
    os.mkfifo(tmp_path / "events.out.tfevents.0.pipe")
    (tmp_path / "events.out.tfevents.0.folder").mkdir()
    (tmp_path / "events.out.tfevents.0.link").symlink_to("/dev/zero")
    board = TensorBoard(tmp_path, until(2))
    board.finish()
    assert board.steps == {1, 2}


def test_evaluation_and_hyperparameters_are_included(tmp_path: Path) -> None:
    """The gain with its ends, each reward, and the settings that differ from the defaults; once."""
    write(tmp_path, range(1, 3), 0)
    for _ in range(2):
        board = TensorBoard(tmp_path, all_but_evaluation)
        board.start("run", {"policy.learning_rate": 1e-4, "seed": 3})
        board.log(2, of_evaluation(EVALUATION, "shapes_verifier"))
        board.finish()
    found = written(tmp_path)
    assert set(found.values()) == {1}
    assert found["2_evaluation/gain", 2] == found["2_evaluation/shapes_verifier/trained", 2] == 1
    assert found["2_evaluation/diversity_to_base", 2] == found["1_reward/redness", 2] == 1
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    sessions = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    given = HParamsPluginData.FromString(sessions).session_start_info.hparams
    assert given["policy.learning_rate"].number_value == 1e-4
    assert given["seed"].number_value == 3
    experiment = read.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = [info.name.tag for info in HParamsPluginData.FromString(experiment).experiment.metric_infos]
    assert metrics == ["2_evaluation/gain", "2_evaluation/gain_low", "2_evaluation/gain_high"]


class Weighed:
    """A reward with settings, some of which nobody else may know."""

    class Settings(extensions.Settings):
        size: int = 3
        api_key: str = ""
        tokenizer: str = "bpe"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return images.mean((1, 2, 3))


def test_hyperparameters_are_what_differs_from_the_defaults_without_secrets() -> None:
    """Flat names and plain values, those of extensions too; a field that may hold a secret by its name is left out."""
    use = "tests.latentac.test_tracking:Weighed"
    reward = {"use": use, "name": "weighed", "size": 5, "api_key": "hidden"}
    given = fields(rewards=[reward], policy={"learning_rate": 1e-3}, seed=4, gate={"reward": "weighed"})
    found = hyperparameters(resolve_all(given).config)
    assert found["policy.learning_rate"] == 1e-3
    assert found["rewards.0.size"] == 5
    assert found["seed"] == 4
    assert not {"policy.weight_decay", "rewards.0.tokenizer", "rewards.0.api_key", "rewards.0.retries"} & found.keys()
    assert "hidden" not in str(found)
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


@pytest.mark.parametrize("uri", ["mlruns", "sqlite:///mlflow.db"])
def test_mlflow_gets_a_run_once(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real MLflow, a store of files or of SQLite: parameters, metrics, images; the resumed run goes on in the
    same one, although it is resumed from another folder."""
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = config({"use": "mlflow", "tracking_uri": uri, "experiment": "shapes"}, seed=5)
    for number, iterations in enumerate((range(1, 4), range(3, 5))):  # the second start repeats iteration 3
        (tmp_path / f"start-{number}").mkdir()
        monkeypatch.chdir(tmp_path / f"start-{number}")
        trackers = make_trackers(settings.tracking, tmp_path / "run")
        with tracking(trackers, "run", hyperparameters(settings)):
            for iteration in iterations:
                trackers[0].log(iteration, of_iteration(entry(iteration)))
                trackers[0].image("rollouts", iteration, IMAGE)
        assert list(Path().iterdir()) == []
    trackers = make_trackers(settings.tracking, tmp_path / "run")
    with tracking(trackers, "run", hyperparameters(settings)):
        trackers[0].log(4, of_evaluation(EVALUATION, "shapes_verifier"))

    client = MlflowClient(uri.replace("///", f"///{tmp_path}/") if ":" in uri else str(tmp_path / uri))
    experiment = client.get_experiment_by_name("shapes")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "5"
    history = client.get_metric_history(run.info.run_id, "reward/redness")
    assert sorted(metric.step for metric in history) == [1, 2, 3, 4]
    assert run.data.metrics["evaluation/gain"] == pytest.approx(0.2217)
    assert len([path for path in (tmp_path / "mlruns").rglob("*.png") if "rollouts" in path.name]) == 4


def test_mlflow_sends_no_images_where_none_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`images: false`; and an experiment that is not named is that of MLflow's own variable."""
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    settings = config({"use": "mlflow", "images": False})
    trackers = make_trackers(settings.tracking, tmp_path / "run")
    with tracking(trackers, "run", hyperparameters(settings)):
        trackers[0].log(1, of_iteration(entry(1)))
        trackers[0].image("rollouts", 1, IMAGE)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("of the environment")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["reward/redness"] == pytest.approx(0.1)
    assert list(tmp_path.rglob("*.png")) == []


def recorded(folder: Path) -> list[Any]:
    """What wandb has written offline of the run in `folder`."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = (folder / "wandb").glob("offline-run-*/run-run.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    records = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        records.append(record)
    return records


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wandb: id, configuration, history and results are in its file, for `wandb sync`; nothing is asked."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    settings = config({"use": "wandb", "project": "shapes", "mode": "offline"}, seed=5)
    (tmp_path / "run").mkdir()
    trackers = make_trackers(settings.tracking, tmp_path / "run")
    with tracking(trackers, "run", hyperparameters(settings)):
        for iteration in (1, 2):
            trackers[0].log(iteration, of_iteration(entry(iteration)))
            trackers[0].image("rollouts", iteration, IMAGE)
        trackers[0].log(2, of_evaluation(EVALUATION, "shapes_verifier"))

    records = recorded(tmp_path / "run")
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project) == ("run", "shapes")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["seed"] == 5
    logged: dict[str, list[Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                logged.setdefault(name, []).append(json.loads(item.value_json))
    assert logged["reward/redness"] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert logged["evaluation/gain"] == [pytest.approx(0.2217)]
    assert list((tmp_path / "run" / "wandb").rglob("rollouts*.png"))


def test_wandb_takes_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entity, group and tags of the configuration, project and mode of wandb's own variables; no images."""
    pytest.importorskip("wandb")
    for name, value in (("API_KEY", ""), ("ERROR_REPORTING", "false"), ("PROJECT", "theirs"), ("MODE", "offline")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    settings = config({"use": "wandb", "entity": "team", "group": "sweep", "tags": ["a", "b"], "images": False})
    (tmp_path / "run").mkdir()
    trackers = make_trackers(settings.tracking, tmp_path / "run")
    with tracking(trackers, "run", hyperparameters(settings)):
        trackers[0].log(1, of_iteration(entry(1)))
        trackers[0].image("rollouts", 1, IMAGE)
    (run,) = [record.run for record in recorded(tmp_path / "run") if record.WhichOneof("record_type") == "run"]
    assert (run.entity, run.project, run.run_group, list(run.tags)) == ("team", "theirs", "sweep", ["a", "b"])
    assert list((tmp_path / "run" / "wandb").rglob("rollouts*.png")) == []


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """A server that is down: one warning with the reason, without the password in its address."""

    class Down(Notebook):
        def __init__(self) -> None:
            super().__init__(Path("run"))

        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            raise ConnectionError("http://user:secret@tracker:5000 refused")

    tracker = Background("mlflow", Down)
    with caplog.at_level(logging.WARNING, "latentac"), tracking([tracker], "run", {"seed": 0}):
        for step in range(3):
            tracker.log(step, {"reward/x": 1.0})
    assert [record.message for record in caplog.records] == [
        "mlflow is switched off, and the run continues: ConnectionError: http://tracker:5000 refused"
    ]


def test_a_real_server_that_is_down_does_not_hold_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLflow with nobody at the port: seconds, a warning, and the training is done."""
    pytest.importorskip("mlflow")
    settings = config({"use": "mlflow", "tracking_uri": "http://127.0.0.1:9"})
    started = time.monotonic()
    trackers = make_trackers(settings.tracking, tmp_path)
    with caplog.at_level(logging.WARNING, "latentac"), tracking(trackers, "run", hyperparameters(settings)):
        trackers[0].log(1, {"reward/x": 1.0})
    assert time.monotonic() - started < 45
    (message,) = caplog.messages
    assert message.startswith("mlflow (http://127.0.0.1:9) is switched off, and the run continues")


def test_a_tracker_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits longer than the patience says, and what is lost is told."""
    release = threading.Event()

    class Hangs(Notebook):
        def __init__(self) -> None:
            super().__init__(Path("run"))

        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            release.wait(30)

    tracker = Background("wandb", Hangs, patience=0.2)
    with caplog.at_level(logging.WARNING, "latentac"), tracking([tracker], "run", {"seed": 0}):
        tracker.log(1, {})
    release.set()
    assert "wandb does not answer: what it did not take within 0.2 s is lost" in caplog.text


HANGING = """
import logging, pathlib, sys
from latentac.runs.reporting.tracking import Background
from latentac.runs.reporting.tracking.wandb import WandB

logging.basicConfig()
tracker = Background("wandb", lambda: WandB(WandB.Settings(mode="online"), pathlib.Path(sys.argv[1])), patience=8)
tracker.start("run", {"seed": 0})
tracker.log(1, {"a": 1.0})
tracker.finish()
"""


@pytest.mark.timeout(120)
def test_a_process_ends_although_wandbs_own_does_not(tmp_path: Path) -> None:
    """wandb waits for it when the interpreter ends, and it goes on asking a server that is silent. The message names
    the server, and the exit code is that of the training."""
    with faulty("silent") as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-c", HANGING, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"wandb ({server.url}) does not answer: what it did not take within 8 s is lost" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_tracker_cannot_take_fills_no_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training may last for days, and a tracker may hang or have failed on its first one."""
    monkeypatch.setattr("latentac.runs.reporting.tracking._MOST_CALLS", 10)
    release, reported = threading.Event(), []

    class Slow(Notebook):
        def __init__(self) -> None:
            super().__init__(Path("run"))

        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            release.wait(30)
            reported.append(step)

    slow, failed = Background("wandb", Slow, patience=5), Background("mlflow", lambda: Notebook(None), patience=5)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "latentac"):
        with tracking([slow, failed], "run", {"seed": 0}):
            for step in range(100):
                slow.log(step, {"a": 1})
            failed._thread.join(5)
            for step in range(100):
                failed.log(step, {"a": 1})
            assert failed._calls.qsize() <= 10
            release.set()
        assert reported == sorted(set(reported))
        assert 9 <= len(reported) <= 12
    assert caplog.text.count("wandb is too slow") == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained, with what to type."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *a: None if module == name else found(module, *a))
    with pytest.raises(ConfigError, match=r"is not installed.*pip install (mlflow-skinny|wandb)==\d"):
        check({"use": name})


def test_what_mlflow_lacks_for_sqlite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not among what mlflow-skinny brings; nobody else needs it."""
    pytest.importorskip("mlflow")
    found = importlib.util.find_spec
    missing = "sqlalchemy"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else found(name, *a))
    check({"use": "mlflow", "tracking_uri": "http://mlflow:5000"})
    with pytest.raises(ConfigError, match=r"tracking.0.tracking_uri.*pip install sqlalchemy alembic"):
        check({"use": "mlflow", "tracking_uri": "sqlite:///mlflow.db"})


def test_all_that_is_wrong_with_the_trackers_is_reported_at_once() -> None:
    """A misspelt row, an unknown field, a wrong value, a class that is not there, settings for one that has none."""
    pytest.importorskip("mlflow")
    wrong = [
        {"use": "mlfow"},
        {"use": "mlflow", "experment": "x"},
        {"use": "wandb", "mode": "dry"},
        {"use": "no.such:Class"},
        {"use": OWN, "colour": "red"},
    ]
    with pytest.raises(ConfigError) as caught:
        check(*wrong)
    assert [problem.path for problem in caught.value.problems] == [
        "tracking.0.use",
        "tracking.1.experment",
        "tracking.2.mode",
        "tracking.3.use",
        "tracking.4.colour",
    ]
    assert 'Did you mean "mlflow"?' in str(caught.value)
    check({"use": OWN})
    with pytest.raises(ConfigError, match="use MLFLOW_TRACKING_PASSWORD") as caught:
        check({"use": "mlflow", "tracking_uri": "https://user:hidden@tracker"})
    for uri in ("https://us/er:hidden/@tracker", "https://hidden@tracker"):
        with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
            check({"use": "mlflow", "tracking_uri": uri})
        assert "hidden" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.slow
def test_a_training_and_its_evaluation_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real worker with a tracker of the user's own: told in order; TensorBoard's files are in the store as here."""
    HERE.clear()
    space = prepared(tmp_path, f"tracking=[{{use: '{OWN}'}}]")
    assert train_here(tmp_path, monkeypatch) == (0, "")
    assert HERE == [
        ("made", RUN),
        ("start", RUN, 0),
        ("log", 1, "reward/jpeg_compressibility"),
        ("image", "rollouts", 1),
        ("log", 2, "reward/jpeg_compressibility"),
        ("image", "rollouts", 2),
        ("finish",),
    ]
    HERE.clear()
    track(space, {"evaluation/gain": 0.5})
    assert HERE[2:] == [("log", 2, "evaluation/gain"), ("finish",)]
    found = written(tmp_path / RUN / "tensorboard")
    assert set(found.values()) == {1}
    assert {step for tag, step in found if tag == "1_reward/reward_mean"} == {1, 2}
    assert found["2_evaluation/gain", 2] == 1
    copy = tmp_path / "copy"
    open_store(f"file://{tmp_path}/store").read_files(f"tensorboard/{RUN}", copy)
    assert written(copy) == found


@pytest.mark.slow
def test_a_pod_that_goes_on_elsewhere_has_the_whole_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is gone: the files come from the store, and what they lack from the checkpoint's history."""
    import shutil

    prepared(tmp_path)
    assert train_here(tmp_path, monkeypatch)[0] == 0
    store = open_store(f"file://{tmp_path}/store")
    store.delete(f"{RUN}/train")
    shutil.rmtree(tmp_path / RUN / "tensorboard")
    lost = tmp_path / "store" / "tensorboard" / RUN
    for path in lost.iterdir():
        path.unlink()
    assert train_here(tmp_path, monkeypatch)[0] == 0
    found = written(tmp_path / RUN / "tensorboard")
    assert {step for tag, step in found if tag == "1_reward/reward_mean"} == {1, 2}
    assert set(found.values()) == {1}
