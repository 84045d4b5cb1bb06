"""The first hour with a model, a reward and prompts of one's own: from the built wheel, outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.latentac.miniatures import sd15

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
PACKAGE = {
    "mine/__init__.py": "",
    "mine/rewards.py": '''
import json
from pathlib import Path

from latentac.config.extensions import Settings
from latentac.config.sections import Positive

TARGETS = json.loads((Path(__file__).parent / "targets.json").read_text())


class Closeness:
    """How close the mean colour is to the one that the prompt file asks for."""

    unit = "minus grey levels"

    class Settings(Settings):
        """How it measures."""

        power: Positive = 1
        """1 for the mean distance, 2 for the root mean square."""

    def __init__(self, settings):
        self.power = settings.power

    def __call__(self, images, prompts, metadata):
        means = images.mean((1, 2))
        wanted = [TARGETS[one["target"]] for one in metadata]
        return [-float((abs(m - w) ** self.power).mean() ** (1 / self.power)) for m, w in zip(means, wanted)]
''',
    "mine/targets.json": '{"warm": [200, 120, 60], "cold": [60, 120, 200]}',
    "mine/algorithms.py": '''
from latentac.training.algorithms import Algorithm, Credit
from latentac.training.algorithms.surrogate import SurrogateSettings, policy_loss


class Sign(Algorithm):
    """Only whether an image is better than what the critic expected counts, not by how much."""

    uses_critic = True

    class Settings(SurrogateSettings):
        """Those of the surrogate, and a threshold."""

        threshold: float = 0.0
        """Smallest surprise that counts, in the reward's unit."""

    def __init__(self, settings, weights):
        self.settings, self.weights, self.memory = settings, weights, {}

    def credit(self, rewards, values, prompts):
        surprise = (rewards[:, None] - values) @ self.weights.to(rewards)
        advantages = surprise.sign() * (surprise.abs() > self.settings.threshold)
        return Credit(advantages, rewards[:, None].expand_as(values))

    def loss(self, transition, minibatch):
        return policy_loss(self.settings, transition, minibatch)
''',
    "mine/steering.py": '''
from latentac.sampling.steering import SteeringSettings, weighted
from latentac.sampling.steering.best_of_n import BestOfN


class Second(BestOfN):
    """Keeps the particle of a rank that its settings name."""

    summary = "keeps the second best"

    class Settings(SteeringSettings):
        """Those of every method, and a rank."""

        rank: int = 1
        """0 is the best."""
        sweep_particles: list[int] = [3]

    def select(self, values):
        scores = weighted(values.flatten(0, 1), self.weights).view(values.shape[:2])
        return scores.argsort(1, descending=True)[:, min(self.settings.rank, self.particles - 1)]
''',
}
CONFIG = """
backbone: {source: my-model}
prompts: {source: prompts.jsonl, held_out_fraction: 0.3}
rewards:
  - {use: "mine.rewards:Closeness", name: colour, power: 2}
  - {use: "mine.rewards:Closeness", name: plain, weight: 0.0}
policy: {adaptation: lora, lora_rank: 4, lora_alpha: 8}
algorithm: {use: "mine.algorithms:Sign", threshold: 0.01}
kernel: {num_steps: 4}
steering:
  methods: [{use: value_gradient, sweep: [5.0], sweep_particles: []}, {use: "mine.steering:Second", name: second}]
gate: {reward: colour, max_latency_ratio: 20.0}
"""


class Home:
    """A folder of a person who has installed the wheel, and nothing else of the project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "env" / "bin"

    def run(self, *command: str, **environment: str) -> str:
        """The command's stdout; it must end well."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LATENTAC"))}
        clean |= {"HF_HUB_OFFLINE": "1", "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", **environment}
        done = subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The wheel in an environment of its own, which finds the dependencies in this one."""
    folder = tmp_path_factory.mktemp("home")
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    for name in subprocess.run(
        ["git", "ls-files", "-m", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():  # what is not committed yet is tested as well
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    wheel.unlink()
    command = folder / "env" / "bin" / "latentac"
    python = folder / "env" / "bin" / "python"
    command.write_text(f"#!{python}\nimport sys\nfrom latentac.runs.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    lines = [
        {"prompt": f"a {colour} {shape}", "category": shape, "target": target}
        for shape in ("circle", "square", "triangle")
        for colour, target in (("red", "warm"), ("yellow", "warm"), ("blue", "cold"), ("cyan", "cold"))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mine.yaml").write_text(CONFIG)
    sd15(folder / "my-model", size=64, sharded=True)
    sd15(folder / "my-model", size=64, sharded=True, variant="fp16")
    return Home(folder)


def drawn(folder: Path) -> np.ndarray:
    with Image.open(folder / "image.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_own_model_reward_and_prompts_are_promoted_and_served(home: Home) -> None:
    """After the demo's smoke run in the same folder: your own package with a reward with options, an algorithm and a
    steering method; prompts with metadata; a sharded SD1.5 layout with a variant beside it; LoRA. From `latentac run`
    to promoted and served; and both exports draw the served image in plain diffusers, within one grey level."""
    began = time.monotonic()
    imported = home.run(
        "python", "-c", "import latentac.pipelines; print(latentac.__file__, latentac.pipelines.__file__)"
    )
    assert str(ROOT) not in imported
    home.run("latentac", "run", "--recipe", "shapes-unet-smoke", "--seed", "1")
    demo = time.monotonic() - began

    command = ["latentac", "run", "--recipe", "shapes-unet-smoke", "--config", "mine.yaml", "--package", "mine"]
    planned = home.run(*command, "--dry-run")
    assert "mine.rewards:Closeness" in planned
    output = home.run(*command)
    print(output)
    assert "gate     promote" in output
    name = re.findall(r"^run (\S+), recipe", output, re.M)[0]
    summary: dict[str, Any] = json.loads((home.folder / "runs" / name / "summary.json").read_text())
    assert summary["serving"]["project"] == "mine", "the demo's model judges no other project's"
    assert set(summary["evaluation"]["trained"]) == {"colour", "plain"}
    assert summary["evaluation"]["units"] == {"colour": "minus grey levels", "plain": "minus grey levels"}
    assert {row["method"] for row in summary["steering"]} == {"none", "value_gradient", "second"}
    assert summary["serving"]["version"]

    version = summary["serving"]["version"]
    home.run("latentac", "fetch-model", "--version", version, "--store", "file://runs/store", "--to", "served")
    served = home.folder / "served"
    blocks = re.findall(r"```python\n(.*?)```", (served / "README.md").read_text(), re.S)
    assert len(blocks) == 2, "the merged folder, and the base with the adapter"
    prompt = re.findall(r"^    \"(a [^\"]+)\",$", blocks[0], re.M)[0]
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom PIL import Image\n"
        "from latentac.serving.generator import Generator\n"
        f"made = Generator(Path('served'), torch.device('cpu')).generate({prompt!r}, 0, method='none')\n"
        "Image.fromarray(made.images[0]).save('image.png')\n"
    )
    home.run("python", "-c", script, LATENTAC_ALLOW_EXTENSIONS="mine.steering:Second", PYTHONPATH=str(home.folder))
    expected = drawn(home.folder)
    assert expected.std() > 1, "an image of one colour proves nothing"
    for block in blocks:
        (served / "image.png").unlink(missing_ok=True)
        if not (served / "my-model").exists():
            (served / "my-model").symlink_to(home.folder / "my-model")
        home.run("python", "-c", f"import os; os.chdir('served')\n{block}")
        difference = np.abs(drawn(served) - expected).max()
        print(f"largest difference to the served image: {difference} of 255")
        assert difference <= 1
    print(f"demo {demo:.0f} s, all {time.monotonic() - began:.0f} s")
