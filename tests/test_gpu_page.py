"""docs/gpu.md: every command, with a miniature in the layout of Stable Diffusion 1.5 in the hub's cache."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.latentac import miniatures
from tests.test_examples import blocks

HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = [
    *("kernel.num_steps=3", "train.num_iterations=1", "train.images_per_iteration=8", "train.block_images=4"),
    *("pretrain.num_images=8", "pretrain.num_held_out_images=8", "pretrain.num_passes=1", "train.checkpoint_every=1"),
    *("evaluation.num_images=8", "evaluation.num_diversity_prompts=4", "evaluation.num_bootstrap=100"),
    *("steering.num_images=8", "gate.min_gain=-100", "gate.min_lower_bound=-100", "gate.min_diversity_kept=0"),
    *("gate.max_latency_ratio=100", "gate.max_loss_fraction=100", "evaluation.num_gallery_prompts=2"),
]
"""The page's run in seconds on a CPU."""


def cached(home: Path) -> Path:
    """The cache of a hub that has the miniature under the recipe's id."""
    repository = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    miniatures.sd15(repository / "snapshots" / COMMIT, max_length=77)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return home


def arguments(line: str) -> list[str]:
    """Those of a command of the page; of a run, with the settings of SMALL, which have the last word."""
    words = shlex.split(line)[1:]
    return words + [word for setting in SMALL for word in ("--set", setting)] if words[0] == "run" else words


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_works_on_a_miniature(tmp_path: Path) -> None:
    """From the dry run to an image of the served model."""
    environment = os.environ | {"HF_HOME": str(cached(tmp_path / "hf")), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "."}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), "."]))
    ran = 0
    for block in blocks("docs/gpu.md"):
        if block.file:
            (tmp_path / block.file).parent.mkdir(exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
        elif "test_gpu_page" in block.reason:
            for line in block.text.splitlines():
                command = [sys.executable, "-m", "latentac.runs.cli", *arguments(line)]
                if "serve" in command:
                    _serves(command, tmp_path, environment)
                else:
                    done = subprocess.run(
                        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=400
                    )
                    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
                ran += 1
    assert ran == 5
    exported = [json.loads(file.read_text()) for file in tmp_path.glob("runs/store/models/*/files-*/latentac.json")]
    assert {(each["base"]["name"], each["base"]["commit"]) for each in exported} == {(HUB_ID, COMMIT)}
    assert (tmp_path / "fox.png").read_bytes().startswith(b"\x89PNG")


def _serves(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The server answers, and ends when it is asked to."""
    port = command[command.index("--port") + 1]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                if server.poll() is not None:
                    raise AssertionError(f"the server ended with {server.returncode}")
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).status_code == 200:
                        return
                except httpx.TransportError:
                    time.sleep(0.5)
            raise AssertionError("the server was not ready in 120 s")
        finally:
            server.terminate()
            server.wait(60)
