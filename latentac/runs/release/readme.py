"""README.md of an exported folder: its model card, written when it is trained and again when it is released.

Only the first needs torch: the second takes over how to draw, and knows more of the rest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.runs.reporting.card import Facts, folder_card, only_adapter, sections, use_section
from latentac.runs.workspace import EXTENSIONS, Workspace
from latentac.store.published import read
from latentac.system.errors import ArtifactNotFound
from latentac.system.folders import ADAPTER, INDEX
from latentac.system.reading import read_record

if TYPE_CHECKING:
    from latentac.sampling.policy import Policy

FILE = "README.md"


def write_trained(space: Workspace, policy: "Policy", folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """That of the pipeline in `folder`, which `policy` has just saved."""
    from latentac.sampling.snippet import base_of, usage

    config = space.config
    call = policy, folder, config.kernel.num_steps, space.prompts.held_out[0].text, config.seed
    use, adapter = use_section(usage(*call)), ""
    if (folder / ADAPTER).is_file():
        adapter = use_section(usage(*call, base_of(config.card.base_model or config.backbone.source)), adapter=True)
    _write(folder, folder, _facts(space, history), use, adapter)


def write_released(space: Workspace, source: Path, folder: Path, version: str) -> None:
    """That of the model in `folder`, a copy of the trained pipeline `source`, with all that was measured. version: as
    which it is served, "" where nobody has deployed it."""
    readme = source / FILE
    use, adapter = sections(readme.read_text(encoding="utf-8")) if readme.is_file() else ("", "")
    facts = {**_facts(space, _read(space, "train", "history.json") or []), "serving": version and {"version": version}}
    if space.config.export.weights == "adapter":
        _write(folder, source, facts, "", only_adapter(adapter))
    else:
        _write(folder, source, facts, use or use_section(""), adapter)


def _write(folder: Path, pipeline: Path, facts: Facts, use: str, adapter: str) -> None:
    kind = read_record(pipeline / INDEX)["_class_name"]
    (folder / FILE).write_text(folder_card(facts, kind, use, adapter), encoding="utf-8")


def _facts(space: Workspace, history: Sequence[dict[str, Any]]) -> Facts:
    config = space.config
    return {
        "run": space.run,
        "recipe": config.recipe,
        "seed": config.seed,
        "commit": (_read(space, "prepare", "environment.json") or {}).get("commit"),
        "settings": config.model_dump(),
        "units": (_read(space, "prepare", EXTENSIONS) or {}).get("units"),
        "evaluation": _read(space, "evaluate", "evaluation.json"),
        "training": history,
        "steering": _read(space, "steer", "steering.json"),
        "gate": space.decision(),
        "serving": None,
    }


def _read(space: Workspace, step: str, name: str) -> Any:
    """A JSON file of a step of this very configuration; None where the step has not run or did not leave it."""
    try:
        file = space.artifact(step) / name if space.finished(step) else None
    except ArtifactNotFound:
        return None
    return read(file) if file is not None and file.is_file() else None
