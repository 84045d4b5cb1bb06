"""Runs as their steps publish them, made here in milliseconds, for the tests of what is written about runs."""

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from latentac.runs.reporting.report import write_report
from latentac.store import Manifest, Store, open_store

SECONDS = {"prepare": 4.2, "pretrain-value": 38.5, "train": 331.0, "evaluate": 41.7, "steer": 48.9, "gate": 0.9}
SECONDS["deploy"] = 23.8
STEPS = tuple(SECONDS)
SETTINGS = {
    "recipe": "shapes-unet",
    "seed": 7,
    "backbone": {"use": "unet", "source": "builtin:shapes-unet", "device": "auto"},
    "kernel": {"use": "ddim", "num_steps": 10, "noise": 1.0},
    "rewards": [{"use": "shapes_verifier", "weight": 1.0}, {"use": "jpeg_compressibility", "weight": 0.0}],
    "policy": {"adaptation": "full", "learning_rate": 6e-05, "warmup_updates": 20},
    "steering": {
        "num_images": 256,
        "gradient_strengths": [0.0, 1.0, 2.0, 4.0],
        "sweep_particles": [2, 4, 8],
        "strengths": {"value_gradient": 2.0, "resampling": 20.0},
    },
    "gate": {"reward": "shapes_verifier", "min_gain": 0.05, "min_lower_bound": 0.0},
}
ENVIRONMENT = {
    "commit": "3f1c2a9d5e7b8c6a4f0e1d2c3b4a5968778695a4",
    "machine": {
        "cpu": "Example CPU @ 2.60GHz",
        "cores": 2,
        "memory_gib": 23.4,
        "gpu": None,
        "platform": "Linux x86_64",
    },
    "versions": {"python": "3.11.7", "torch": "2.13.0", "diffusers": "0.42.1"},
}
PROMPTS = [
    "a red circle",
    "three blue squares",
    "a green triangle left of a yellow circle",
    "a magenta square and a cyan circle",
    "two yellow triangles",
    "a blue circle above a red square",
    "a cyan triangle",
    "four green circles",
]


def interval(mean: float, half: float, n: int = 1024, name: str = "mean") -> dict[str, Any]:
    return {name: mean, "low": mean - half, "high": mean + half, "n": n}


EVALUATION: dict[str, Any] = {
    "base": {"shapes_verifier": interval(0.3906, 0.0299), "jpeg_compressibility": interval(-1.0932, 0.0081)},
    "trained": {"shapes_verifier": interval(0.6123, 0.0301), "jpeg_compressibility": interval(-1.1217, 0.0078)},
    "difference": {"shapes_verifier": interval(0.2217, 0.0369), "jpeg_compressibility": interval(-0.0285, 0.0064)},
    "units": {
        "shapes_verifier": "share of images that show exactly what their caption says (0 or 1 per image)",
        "jpeg_compressibility": "minus kB (1000 bytes) of the JPEG file at quality 95",
    },
    "categories": {
        "one_object": {"base": 0.588, "trained": 0.871},
        "counting": {"base": 0.502, "trained": 0.747},
        "relation": {"base": 0.081, "trained": 0.218},
    },
    "critic": {"explained_variance": [0.04, 0.08, 0.13, 0.19, 0.25, 0.3, 0.345, 0.38, 0.4, 0.41]},
    "production": {"version": None, "sha256": None, "problem": ""},
    "held_out_gap": {
        "shapes_verifier": interval(0.0187, 0.0544, 256),
        "jpeg_compressibility": interval(0.002, 0.011, 256),
    },
    "diversity": {
        "base": interval(0.2217, 0.011, 32),
        "trained": interval(0.2209, 0.012, 32),
        "difference": {"base": interval(-0.0008, 0.005, 32)},
        "kept": {"base": interval(0.9964, 0.023, 32, "ratio")},
    },
    "latency": {
        "base": interval(0.0213, 0.0019, 24, "median"),
        "trained": interval(0.0216, 0.0018, 24, "median"),
        "ratio": {"base": interval(1.0142, 0.031, 24, "median")},
        "block_images": 4,
    },
    "definitions": {"diversity": "mean distance, 0 to 1", "latency": "seconds per image"},
}
VERSION = "run-0-9c1f22ab"


def with_incumbent(files: dict[str, Any]) -> None:
    """`files` of a run that found another run's model in production."""
    measured: dict[str, Any] = json.loads(json.dumps(EVALUATION))
    names = ("shapes_verifier", "jpeg_compressibility")
    measured["incumbent"] = dict(zip(names, (interval(0.5711, 0.0305), interval(-1.1104, 0.0079)), strict=True))
    measured["incumbent_difference"] = dict(
        zip(names, (interval(0.0412, 0.0333), interval(-0.0113, 0.0051)), strict=True)
    )
    for arms in measured["categories"].values():
        arms["incumbent"] = 0.345
    measured["production"] = {"version": VERSION, "sha256": "0" * 64, "problem": ""}
    measured["diversity"]["incumbent"] = interval(0.2244, 0.013, 32)
    measured["diversity"]["difference"]["incumbent"] = interval(-0.0035, 0.006, 32)
    measured["diversity"]["kept"]["incumbent"] = interval(0.9844, 0.025, 32, "ratio")
    measured["latency"]["incumbent"] = interval(0.0219, 0.0021, 24, "median")
    measured["latency"]["ratio"]["incumbent"] = interval(0.9863, 0.029, 24, "median")
    files["evaluate"] |= {"evaluation.json": measured, "gallery/incumbent.png": 5}


def history(num_iterations: int) -> list[dict[str, Any]]:
    noise = random.Random(1)
    rows = []
    for iteration in range(1, num_iterations + 1):
        reward = 0.39 + 0.25 * (1 - math.exp(-iteration / 18)) + noise.gauss(0, 0.022)
        rows.append(
            {
                "iteration": iteration,
                "images": 256 * iteration,
                "reward_mean": reward,
                "rewards": {"shapes_verifier": reward, "jpeg_compressibility": -1.09 - 0.0009 * iteration},
                "kl": 0.0021 * min(1, iteration / 6) * noise.uniform(0.7, 1.4),
                "clip_share": 0.19 * min(1, iteration / 5) * noise.uniform(0.8, 1.2),
                "explained_variance": [0.03 * step for step in range(10)],
                "seconds": noise.uniform(7, 9),
                "gradient_norm": 0.4,
                "speed": {
                    "images_per_second": 30.0 + iteration % 2,
                    "straggler": 1.25,
                    "moved_bytes": 12_500_000,
                    "tflops": 148.35,
                    "peak_share": 0.075,
                    "phases": {
                        "rollout": [3.0, 3.5],
                        "policy": [4.0, 4.5],
                        "critic": [0.5, 0.5],
                        "waiting": [0.6, 0.1],
                    },
                },
            }
        )
    return rows


def steering() -> list[dict[str, Any]]:
    arms = [("value_gradient", 0.0, 1, 10, 0.61), ("value_gradient", 1.0, 1, 30, 0.637)]
    arms += [("value_gradient", 2.0, 1, 30, 0.668), ("value_gradient", 4.0, 1, 30, 0.641)]
    arms += [("best_of_n", 0.0, 2, 20, 0.652), ("best_of_n", 0.0, 4, 40, 0.691), ("best_of_n", 0.0, 8, 80, 0.712)]
    return [
        {"method": method, "strength": strength, "particles": particles, "nfe": nfe, "reward": reward}
        | interval(mean if reward == "shapes_verifier" else -1.1 - mean / 100, 0.057 if mean else 0.01, 256)
        | {"seconds": 0.31 * nfe, "diversity": 0.42}
        for method, strength, particles, nfe, mean in arms
        for reward in ("shapes_verifier", "jpeg_compressibility")
    ]


def gallery(prompts: list[str], *arms: str) -> dict[str, Any]:
    """The index, with what each arm's images scored: every third one of `base` is right, every second of others."""
    rewards = {
        arm: {
            "shapes_verifier": [float(i % (3 if arm == "base" else 2) == 0) for i in range(len(prompts))],
            "jpeg_compressibility": [-1.0 - i / 100 for i in range(len(prompts))],
        }
        for arm in arms
    }
    seeds = [f"7/{i}" for i in range(len(prompts))]
    return {"prompts": prompts, "seeds": seeds, "image_size": [32, 32], "columns": 4, "rewards": rewards}


def scores(prompts: list[str]) -> dict[str, Any]:
    """scores.json: 16 images per prompt."""
    every = prompts * 16
    noise = {"seed": 7, "num_steps": 10, "latent_shape": [4, 8, 8]}
    return {"prompts": every, "noise": noise, "rewards": gallery(every, "base", "trained")["rewards"]}


def draw_sheet(path: Path, count: int, seed: int) -> None:
    """A contact sheet of `count` images of 32 x 32, 4 per row: a shape each."""
    colours, numbers = ["#f33", "#3c5", "#46f", "#fd3", "#d4d", "#3cd"], random.Random(seed)
    sheet = Image.new("RGB", (4 * 32, math.ceil(count / 4) * 32), "#13141b")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        x, y, size = index % 4 * 32 + numbers.randint(2, 12), index // 4 * 32 + numbers.randint(2, 12), 14
        shape = draw.ellipse if index % 2 else draw.rectangle
        shape((x, y, x + size, y + size), fill=numbers.choice(colours))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def contents(prompts: list[str]) -> dict[str, dict[str, Any]]:
    """What a complete run publishes: step -> file -> JSON, or the seed of a contact sheet."""
    return {
        "prepare": {
            "config.json": SETTINGS,
            "environment.json": ENVIRONMENT,
            "prompts.json": {"train": [], "held_out": [{"text": text, "category": ""} for text in prompts]},
        },
        "pretrain-value": {
            "metrics.json": {
                "explained_variance": [0.03, 0.06, 0.1, 0.15, 0.2, 0.24, 0.28, 0.3, 0.32, 0.33],
                "history": [],
            }
        },
        "train": {"history.json": history(40)},
        "evaluate": {
            "evaluation.json": EVALUATION,
            "scores.json": scores(prompts),
            "gallery/gallery.json": gallery(prompts, "base", "trained"),
            "gallery/base.png": 1,
            "gallery/trained.png": 2,
        },
        "steer": {
            "steering.json": steering(),
            "gallery/gallery.json": gallery(prompts, "steered"),
            "gallery/steered.png": 3,
        },
        "gate": {
            "gate.json": {
                "decision": "promote",
                "reasons": ["shapes_verifier gained 0.222, its interval's lower end 0.185 is above 0"],
                "checks": [
                    {"name": "gain", "value": 0.2217, "relation": "at least", "bound": 0.05, "passed": True},
                    {"name": "low end", "value": 0.1848, "relation": "at least", "bound": 0.0, "passed": True},
                    {"name": "production", "value": "none", "relation": "is", "bound": "none", "passed": True},
                ],
            },
            "reasons.md": "# Promoted",
        },
        "deploy": {
            "deployment.json": {
                "version": "run-1-3f1c2a9d",
                "endpoint": "http://127.0.0.1:8085/v1/models/latentac:predict",
                "image_sha256": "9b74c9897bac770ffc029102a200c5de7b1b1d2a7c3e8f0b6a5d4c3b2a190807",
                "seconds": 21.4,
                "request": {"instances": [{"prompt": "a red circle", "seed": 7, "strength": 2.0}]},
            },
            "image.png": 4,
        },
    }


def publish(
    folder: Path, files: dict[str, dict[str, Any]], prompts: list[str], run: str = "run-1"
) -> tuple[Store, str]:
    """Publishes `files` of a run as its steps would, and the driver's timings. Gives the store and its URL."""
    url = f"file://{folder}/runs/store"
    store = open_store(url)
    parents: list[Manifest] = []
    for step, content in files.items():
        source = folder / "work" / (step if run == "run-1" else f"{run}-{step}")
        for name, value in content.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                path.write_text(value)
            elif isinstance(value, bytes):
                path.write_bytes(value)
            elif path.suffix == ".png":
                draw_sheet(path, 1 if path.name == "image.png" else len(prompts), value)
            else:
                path.write_text(json.dumps(value))
        metrics = {"seconds": SECONDS[step]}
        manifest = store.publish(
            f"{run}/{step}", source, run=run, step=step, config_hash="c", parents=parents, metrics=metrics
        )
        parents = [manifest]
    return store, url


def publish_until(
    folder: Path,
    last: str = "deploy",
    change: Callable[[dict[str, Any]], object] = lambda files: None,
    prompts: list[str] = PROMPTS,
    run: str = "run-1",
) -> str:
    """Publishes a run, changed by `change`, up to the step `last`, with its timings; gives the store's URL."""
    files = contents(prompts)
    change(files)
    files = {step: files[step] for step in STEPS[: STEPS.index(last) + 1]}
    _, url = publish(folder, files, prompts, run)
    (folder / "runs" / run).mkdir(parents=True, exist_ok=True)
    timings = {
        "steps": {step: 5 + SECONDS[step] for step in files},
        "total": 5.6 + sum(5 + SECONDS[step] for step in files),
    }
    (folder / "runs" / run / "timings.json").write_text(json.dumps(timings))
    return url


def make(
    folder: Path,
    last: str = "deploy",
    change: Callable[[dict[str, Any]], object] = lambda files: None,
    prompts: list[str] = PROMPTS,
    run: str = "run-1",
) -> tuple[str, dict[str, Any]]:
    """Publishes a run; gives the page and the summary of its report."""
    url = publish_until(folder, last, change, prompts, run)
    page, summary = write_report(run, url, str(folder / "runs"))
    assert (page.name, summary.name) == ("report.html", "summary.json")
    return page.read_text(), json.loads(summary.read_text(), parse_constant=pytest.fail)


class Page(HTMLParser):
    """What a reader of the page finds: its text outside of charts, addresses, ids and sections."""

    VOID = frozenset(("meta", "img", "br", "wbr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.charts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        self.ids += [found["id"] or ""] if "id" in found else []
        self.images += [found] if tag == "img" else []
        self.charts += tag == "svg" and found.get("role") == "img" and bool(found.get("aria-label"))
        assert tag not in ("script", "iframe", "object", "embed", "form")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if not {"svg", "style", "title"} & set(self.open):
            self.words.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))  # no-break spaces become plain ones


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested JSON that is not a container; of a dictionary the names too."""
    if isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value
