"""`make bench-gpu`: see the package."""

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks import gpu
from benchmarks.aggregate import dump
from benchmarks.gpu import flops, inference, models, table
from benchmarks.gpu.budget import Budget, OverBudget, say
from benchmarks.gpu.flops import BACKWARD
from benchmarks.gpu.models import Model
from benchmarks.gpu.ours import Arm, Ours, configuration
from benchmarks.gpu.plain import PlainLoop
from benchmarks.gpu.turns import TURNS, Make, Record, compared, described, measure, release
from benchmarks.plan import FULL, require_clean_tree
from latentac.runs.preparation.prepare import environment
from latentac.sampling.devices import few_threads
from latentac.system.names import as_name

SECONDS = 450
"""Of the whole run, imports not counted: with them it ends within 8 minutes."""
DRY_TURNS = 2
BUDGETS = {
    "sd15": {"write": 10, "lora": 55, "inference": 25, "full": 60},
    "sd35m": {"write": 20, "lora": 70, "inference": 30, "full": 80},
}
"""Model -> the seconds that are kept for each part. What is left of SECONDS, and what a part leaves over, goes to the
parts behind it in their order."""

_NO_ARMS: Record = {
    name: {"turns": 0, "beside": True, "note": "", "memory": None} for name in ("ours", "grpo", "plain")
}


@dataclass(frozen=True)
class Bench:
    """What the parts of a run share. peak: of a matrix product, per second; turns: of an arm; own: overrides of
    latentac's arms."""

    device: torch.device
    folder: Path
    budget: Budget
    peak: float
    turns: int
    own: tuple[str, ...]

    def write(self, name: str, model: Model) -> Record:
        """The model's pipeline, where the other parts look for it."""
        (self.folder / name).mkdir()
        return {"path": models.write(model, self.folder / name, self.device)}

    def case(self, name: str, model: Model, cost: flops.Cost, adaptation: str) -> Record:
        """The arms of one adaptation: latentac with its critic, the same with GRPO, and the plain loop."""
        pipeline = self.folder / name / "pipeline"

        def ours(algorithm: str, rows: int) -> Ours:
            return Ours(configuration(Arm(model, pipeline, adaptation, algorithm, self.device, self.own), rows))

        makers: dict[str, Make] = {
            "ours": partial(ours, "ppo"),
            "grpo": partial(ours, "grpo"),
            "plain": lambda rows: PlainLoop(model, pipeline, adaptation, rows, self.device),
        }
        found = measure(makers, model.rows, self.device, self.budget, self.turns)
        arms = {arm: one.record() for arm, one in found.items()}
        for arm, one in found.items():
            arms[arm]["flops_per_image"] = cost.image(model.steps, one.trained, adaptation) if one.trained else None
        return {
            "model": name,
            "label": model.label,
            "adaptation": adaptation,
            "clip": model.clip,
            "arms": arms,
            "ratio": compared(found["ours"], found["plain"]),
            "critic": compared(found["grpo"], found["ours"]),  # images per second: the inverse of the times
            "note": "",
        }

    def inference(self, name: str, model: Model) -> Record:
        """Steering and endpoint with the base weights."""
        pipeline = self.folder / name / "pipeline"
        config = configuration(Arm(model, pipeline, "lora", "ppo", self.device, self.own), model.rows)
        found = inference.measure(config, self.device, self.folder / name / "served", self.budget)
        return {"model": name, "label": model.label, **found}

    def attempt(self, part: str, work: Callable[[], Record], otherwise: Record) -> Record:
        """What `work` gives within its time; `otherwise` with a note where it fails, so that the rest still runs."""
        try:
            with self.budget.part(part):
                return work()
        except OverBudget as stopped:
            return {**otherwise, "note": str(stopped)}
        except Exception as error:  # noqa: BLE001 - the other parts are still worth their numbers
            traceback.print_exc()
            return {**otherwise, "note": described(error)}
        finally:
            release(self.device)


def run(chosen: dict[str, Model], device: torch.device, seconds: float, own: Sequence[str], folder: Path) -> Record:
    """The record of all parts of these models, by name."""
    turns = TURNS if device.type == "cuda" else DRY_TURNS
    parts = {f"{name} {part}": spent for name in chosen for part, spent in BUDGETS[name].items()}
    bench = Bench(device, folder, Budget(seconds, parts), flops.peak(device), turns, tuple(own))
    say(f"largest matrix product: {bench.peak / 1e12:.3g} TFLOP/s")
    costs = {name: flops.count(model) for name, model in chosen.items()}
    found: Record = {"cases": [], "inference": []}
    for name, model in chosen.items():
        label = {"model": name, "label": model.label}
        bench.attempt(f"{name} write", partial(bench.write, name, model), {})
        for part in BUDGETS[name]:
            if part in BACKWARD:
                nothing = {
                    **label,
                    "adaptation": part,
                    "clip": model.clip,
                    "arms": _NO_ARMS,
                    "ratio": None,
                    "critic": None,
                }
                work = partial(bench.case, name, model, costs[name], part)
                found["cases"].append(bench.attempt(f"{name} {part}", work, nothing))
            elif part == "inference":
                work = partial(bench.inference, name, model)
                found["inference"].append(bench.attempt(f"{name} {part}", work, label))
    return {
        "seconds": bench.budget.spent,
        "peak": bench.peak,
        "peak_dtype": "bfloat16" if device.type == "cuda" else "float32",
        "overrides": list(own),
        "models": {name: models.described(model) | asdict(costs[name]) for name, model in chosen.items()},
        **found,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=gpu.__doc__.partition("\n")[0])
    parser.add_argument("--models", type=_names, default=list(models.REAL), help=f"of {', '.join(models.REAL)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run; each part has a share of it")
    parser.add_argument("--dry-run", action="store_true", help="walk through miniatures, as without a GPU")
    parser.add_argument("--set", action="append", default=[], help="path=value over latentac's configuration")
    parser.add_argument(
        "--output", type=Path, default=FULL.results / "gpu", help="folder of <machine>.json and README.md"
    )
    options = parser.parse_args(arguments)
    dry = options.dry_run or not torch.cuda.is_available()
    if not dry:
        require_clean_tree(options.output)
    device = torch.device("cpu" if dry else "cuda")
    for each in (diffusers_logging, transformers_logging):  # loading and writing have bars and warnings of their own
        each.set_verbosity_error()
        each.disable_progress_bar()
    chosen = {name: (models.MINIATURE if dry else models.REAL)[name] for name in options.models}
    with tempfile.TemporaryDirectory() as temporary, few_threads():
        found = run(chosen, device, options.seconds, options.set, Path(temporary))
    where = environment()
    if dry:
        where["machine"]["gpu"] = None
    found = {
        "experiment": "gpu",
        "command": _command(options.models, options.set),
        "dry_run": dry,
        "commit": where["commit"],
        "machine": where["machine"],
        "versions": where["versions"],
        **found,
    }
    name = as_name(where["machine"]["gpu"] or f"dry-run-{where['machine']['cpu']}").lower()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(dump(found))
    known = [json.loads(path.read_text()) for path in options.output.glob("*.json")]
    (options.output / "README.md").write_text(table.document(known))
    print(table.markdown(found))
    return 0 if all(_complete(one) for one in (*found["cases"], *found["inference"])) else 1


def _command(names: Sequence[str], own: Sequence[str]) -> str:
    chosen = "" if list(names) == list(models.REAL) else f' MODELS="{" ".join(names)}"'
    return f"make bench-gpu{chosen}" + (f' SET="{" ".join(own)}"' if own else "")


def _names(text: str) -> list[str]:
    names = text.replace(",", " ").split()
    unknown = [name for name in names if name not in models.REAL]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no model: known are {', '.join(models.REAL)}")
    return names


def _complete(record: dict[str, Any]) -> bool:
    """Whether a part has all its numbers."""
    return not record["note"] and all(arm["turns"] for arm in record.get("arms", {}).values())


if __name__ == "__main__":
    sys.exit(main())
