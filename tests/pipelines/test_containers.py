"""`latentac run --containers`: real containers of a real docker daemon, artifacts in a real MinIO in one of them.

One run is killed with -9 in the middle and resumed; each of its containers is looked at as it is made. Code of one's
own comes with the run, and in images made as images/README.md shows.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from docker.errors import DockerException

from latentac.pipelines import containers
from latentac.runs import package
from latentac.store import access
from latentac.system.errors import ConfigError, ResourceError
from latentac.system.steps import NAMES as STEPS
from latentac.worlds.builtin import builtin_pipeline
from tests.test_examples import Reader, blocks
from tools.docker import Docker
from tools.golang import Unavailable

PROGRAM = str(Path(sys.executable).with_name("latentac"))
RECIPE = ["--recipe", "shapes-unet-smoke"]
IMAGES = ("pipeline", "train", "serve", "minio")
OWN = {
    "mine/__init__.py": "",
    "mine/rewards.py": '''
from latentac.config.schema import Number
from latentac.config.extensions import Settings


class Lightness:
    """How light an image is, counted from an origin."""

    unit = "grey levels"

    class Settings(Settings):
        origin: Number = 0.0
        """The grey level that is worth nothing."""

    def __init__(self, settings):
        self.origin = settings.origin

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)) - self.origin
''',
    "mine/steering.py": '''
from latentac.sampling.steering.best_of_n import BestOfN


class Pick(BestOfN):
    """Best of n, which the served model then names."""
''',
    "prompts.txt": "a red circle\na blue square\na green circle\na yellow square\na red square\na blue circle\n",
    "mine.yaml": """
backbone: {source: my-model}
prompts: {source: prompts.txt}
rewards: [{use: "mine.rewards:Lightness", name: light, origin: 300.0}]
kernel: {num_steps: 2}
pretrain: {num_images: 8, num_held_out_images: 8, num_passes: 1, minibatch_states: 8}
train: {num_iterations: 1, images_per_iteration: 4, block_images: 2, updates_per_iteration: 1, num_workers: 1}
evaluation: {num_images: 8, num_gallery_prompts: 2, num_diversity_prompts: 2, images_per_prompt: 2}
steering: {num_images: 8, methods: [{use: "mine.steering:Pick", name: pick, sweep_particles: [2]}]}
gate: {reward: light, min_gain: -1000.0, min_lower_bound: -1000.0}
""",
}


@dataclass
class Watch:
    """What the daemon said of each container of ours when it was made."""

    docker: Docker
    seen: list[dict[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        client = self.docker.client()
        events = client.events(
            decode=True, filters={"type": "container", "event": "create", "label": "latentac.driver"}
        )

        def note() -> None:
            for event in events:
                with contextlib.suppress(DockerException):  # gone already
                    self.seen.append(client.api.inspect_container(event["id"]))

        thread = threading.Thread(target=note, daemon=True)
        thread.start()
        try:
            yield
        finally:
            events.close()
            thread.join(10)
            client.close()

    def alive(self, run: str = "") -> list[str]:
        """Names of our containers that are there now, of one run or of all."""
        with contextlib.closing(self.docker.client()) as client:
            label = f"latentac.run={run}" if run else "latentac.driver"
            found = client.containers.list(all=True, filters={"label": label}, ignore_removed=True)
            return [str(container.name) for container in found]

    def end(self, run: str, how: str) -> None:
        """`kill` the run's containers, or `remove` them, so that nobody can ask how they ended."""
        with contextlib.closing(self.docker.client()) as client:
            for container in client.containers.list(filters={"label": f"latentac.run={run}"}):
                container.kill() if how == "kill" else container.remove(force=True)


@dataclass
class Driver:
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, ready: Callable[[], Any], seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, f"the driver ended:\n{self.text}"
            assert time.monotonic() < deadline, f"it did not come to that:\n{self.text}"
            time.sleep(0.05)

    @property
    def run(self) -> str:
        self.wait_for(lambda: self.text.startswith("run ") and "\n" in self.text, 120)
        return self.text.split()[1].rstrip(",")


def start(docker: Docker, output: Path, *options: str) -> Driver:
    log = output.parent / f"{time.time_ns()}.log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LATENTAC_S3"))}
    command = [PROGRAM, "run", "--containers", "--output", str(output), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=clean | docker.environment,
            cwd=output.parent,
        )  # fmt: skip
    return Driver(process, log)


def gone(watch: Watch, run: str, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while watch.alive(run):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="module")
def images(docker_daemon: Docker) -> Docker:
    try:
        for name in IMAGES:
            docker_daemon.image(os.environ.get(f"LATENTAC_IMAGE_{name.upper()}") or f"latentac/{name}:dev")
    except Unavailable as error:
        pytest.skip(str(error))
    return docker_daemon


@pytest.fixture(scope="module")
def run(images: Docker, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str, Watch]:
    """A run whose driver was killed in training: its id, its output, what the second driver printed, its containers."""
    output, watch = tmp_path_factory.mktemp("containers") / "runs", Watch(images)
    with watch.watching():
        first = start(images, output, *RECIPE)
        first.wait_for(lambda: "] train\n" in first.text)
        first.wait_for(lambda: watch.alive(first.run))
        first.process.kill()
        first.process.wait()
        assert gone(watch, first.run), "a container outlived the driver that was killed"
        second = start(images, output, "--resume", first.run)
        assert second.process.wait(1800) == 0, second.text
    return first.run, output, second.text, watch


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(2400)
def test_the_smoke_recipe_runs_in_containers_to_a_served_image(run: tuple[str, Path, str, Watch]) -> None:
    """The steps that were done stay done, the rest runs, and the server's image is in the report."""
    name, output, text, _ = run
    summary = json.loads((output / name / "summary.json").read_text())

    for number, step in enumerate(STEPS, start=1):
        assert f"[{number}/8] {step} done" in text
    assert "[2/8] pretrain-value done already" in text
    assert summary["gate"]["decision"] == "promote"
    assert len(summary["serving"]["image_sha256"]) == 64
    assert "served" in (output / name / "report.html").read_text()
    assert "latentac serve" not in text  # its MinIO has ended
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(2400)
def test_each_container_is_confined(run: tuple[str, Path, str, Watch]) -> None:
    """A numeric user that is not root, a read-only root, no capability, no way to gain one; no secret on a command
    line; only the run's folder, or MinIO's, to write to."""
    name, output, _, watch = run
    steps = [seen for seen in watch.seen if "latentac.run" in seen["Config"]["Labels"]]
    servers = [seen for seen in watch.seen if "latentac.minio" in seen["Config"]["Labels"]]

    assert len(steps) >= len(STEPS) + 2
    assert len(servers) == 2
    for seen in watch.seen:
        user, _, group = seen["Config"]["User"].partition(":")
        assert int(user) > 0
        assert int(group) > 0
        host = seen["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert not host["Privileged"]
        for mount in seen["Mounts"]:
            inside = Path(mount["Source"]).is_relative_to(output / name)
            assert inside or mount["Source"] == str(output / ".minio" / "data")
        given = dict(entry.partition("=")[::2] for entry in seen["Config"]["Env"])
        secrets = [given[key] for key in ("AWS_SECRET_ACCESS_KEY", "MINIO_ROOT_PASSWORD") if key in given]
        assert secrets
        words = " ".join([seen["Path"], *seen["Args"]])
        assert not [secret for secret in secrets if secret in words]


@pytest.mark.slow
@pytest.mark.cluster
def test_nothing_is_left_when_it_has_ended(run: tuple[str, Path, str, Watch]) -> None:
    """No container, no file of another owner than the containers' user in the run's folder."""
    name, output, _, watch = run
    assert gone(watch, "")
    assert list((output / name).glob(".*")) == []


def write_own(folder: Path) -> None:
    """Code, prompts, a model in `my-model`, and the settings that name them."""
    shutil.copytree(builtin_pipeline("shapes-unet"), folder / "my-model", dirs_exist_ok=True)
    for name, text in OWN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def promoted(output: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the summary of the one run in `output`. Its reward had its option, and its model is served."""
    (file,) = output.glob("*/summary.json")
    summary = json.loads(file.read_text())
    assert summary["evaluation"]["trained"]["light"]["mean"] < -45  # 255 at most, from an origin of 300
    assert {row["method"] for row in summary["steering"]} == {"none", "pick"}
    assert summary["gate"]["decision"] == "promote"
    assert len(summary["serving"]["image_sha256"]) == 64
    return file.parent, summary


@pytest.fixture(scope="module")
def shipped(images: Docker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package, and the output of a run in containers that it was given to."""
    home = tmp_path_factory.mktemp("shipped")
    write_own(home)
    driver = start(images, home / "runs", *RECIPE, "--config", "mine.yaml", "--package", "mine")
    assert driver.process.wait(1200) == 0, driver.text
    return home / "mine", home / "runs"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_a_package_goes_into_the_containers(shipped: tuple[Path, Path]) -> None:
    """Its reward, with an option, and its steering method, with a model and prompts of one's own: to a served image.
    The manifest has the package's hash."""
    folder, output = shipped
    run, _ = promoted(output)

    (kept,) = (run / "kfp").glob("*/prepare/manifest")
    given = json.loads(kept.read_text())["metrics"]["given"]
    assert given["package"] == package.digest(package.pack(folder))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(2400)
def test_images_with_the_code_do_what_the_package_does(
    images: Docker, shipped: tuple[Path, Path], tmp_path: Path
) -> None:
    """Built and named as images/README.md shows, without --package: the same rewards and the same served image."""
    reader = Reader(tmp_path)
    write_own(tmp_path)
    reader.environment |= images.environment
    shown = [block for block in blocks("images/README.md") if "test_containers.py" in block.reason]
    assert [block.language for block in shown] == ["dockerfile", "sh"]
    try:
        for block in shown:
            reader.write(block) if block.file else reader.run(block)
    finally:
        with contextlib.closing(images.client()) as client:
            for name in re.findall(r"--tag (\S+)", shown[-1].text):
                with contextlib.suppress(DockerException):  # it was not built
                    client.images.remove(name)

    run, summary = promoted(tmp_path / "runs")
    _, expected = promoted(shipped[1])
    assert json.loads((run / "request.json").read_text())["package"] == ""
    for arm in ("base", "trained"):
        assert summary["evaluation"][arm] == expected["evaluation"][arm]
    assert summary["serving"]["image_sha256"] == expected["serving"]["image_sha256"]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_ctrl_c_stops_the_containers(images: Docker, tmp_path: Path) -> None:
    """Within seconds, with the command that goes on."""
    watch = Watch(images)
    driver = start(images, tmp_path / "runs", *RECIPE)
    driver.wait_for(lambda: "[1/8] prepare\n" in driver.text)
    name = driver.run
    os.killpg(driver.process.pid, signal.SIGINT)

    assert driver.process.wait(30) == 130, driver.text
    assert f"latentac run --resume {name} --output {tmp_path / 'runs'} --containers\n" in driver.text
    assert gone(watch, name)
    assert "Traceback" not in driver.text


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["kill", "remove"])
def test_a_container_that_dies_is_a_failed_step(images: Docker, tmp_path: Path, how: str) -> None:
    """kfp itself takes one that is gone too soon for a success, and then misses what it should have left."""
    watch = Watch(images)
    driver = start(images, tmp_path / "runs", *RECIPE)
    driver.wait_for(lambda: "[1/8] prepare\n" in driver.text)
    watch.end(driver.run, how)

    assert driver.process.wait(120) == 1, driver.text
    assert "prepare: ended without a message: killed, or out of memory" in driver.text
    assert "[1/8] prepare failed" in driver.text
    assert "[8/8] finish done" in driver.text
    assert "latentac run --resume" in driver.text
    assert "Traceback" not in driver.text


@pytest.mark.slow
@pytest.mark.cluster
def test_a_missing_image_is_reported_before_anything_starts(images: Docker, tmp_path: Path) -> None:
    """With what builds it, and without a folder of a run that never was."""
    environment = {**os.environ, **images.environment, "LATENTAC_IMAGE_TRAIN": "latentac/nowhere:dev"}
    failed = subprocess.run(
        [sys.executable, "-m", "latentac.pipelines", "run-containers", "--output", str(tmp_path / "runs"), *RECIPE],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert failed.returncode == 6
    assert failed.stderr.startswith("image latentac/nowhere:dev: the docker daemon does not have it. Build them")
    assert "make images" in failed.stderr
    assert list((tmp_path / "runs").glob("shapes*")) == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [([], 6, "no docker daemon answers"), (["--store", "file:///x"], 2, "containers share no folder but the run's")],
)
def test_what_cannot_work_is_one_message(tmp_path: Path, options: list[str], code: int, words: str) -> None:
    """No daemon, or a store that containers do not reach: told at once, and no run is made."""
    failed = subprocess.run(
        [
            sys.executable, "-m", "latentac.pipelines", "run-containers", "--output", str(tmp_path / "runs"),
            *RECIPE, *options,
        ],
        env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert failed.returncode == code
    assert words in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("host", ["tcp://host:port", "foo", "unix:///none.sock", "ssh://nobody@127.0.0.1:1"])
def test_a_docker_host_that_is_none_is_one_message(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Whatever the SDK raises for it."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(ResourceError, match="no docker daemon answers") as caught:
        containers._client()
    assert caught.value.where == host


def test_a_daemon_on_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is for elsewhere, and NO_PROXY keeps what was in it."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "example.org")
        monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
        with pytest.raises(ResourceError):
            containers._client()
        proxy.settimeout(0.1)
        with pytest.raises(TimeoutError):
            proxy.accept()
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.org,localhost,127.0.0.1,::1"


def test_the_steps_get_the_store_as_it_is_understood_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripped, with the region that Amazon's tools would take; of another store nothing stays behind."""
    for name in access.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        containers._environment_of_the_store()
    given = {"LATENTAC_S3_ENDPOINT": "http://here:9000/", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
             "AWS_SESSION_TOKEN": "token", "AWS_DEFAULT_REGION": "eu-west-3"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, f"{value}\n")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    understood = containers._environment_of_the_store()
    assert understood == {
        "LATENTAC_S3_ENDPOINT": "http://here:9000", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "token", "AWS_REGION": "eu-west-3",
    }  # fmt: skip
    containers._read_from({"LATENTAC_S3_ENDPOINT": "http://127.0.0.1:1"})
    assert [name for name in access.VARIABLES if name in os.environ] == ["LATENTAC_S3_ENDPOINT"]
