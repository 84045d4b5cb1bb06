"""The artifact of the prepare step."""

import time
from pathlib import Path
from typing import Any

from latentac.config.validation import resolve
from latentac.runs import package as packages
from latentac.runs.publishing import write_json
from latentac.runs.workspace import EXTENSIONS, PACKAGE
from latentac.store import Manifest, Store
from latentac.store.sources import with_local_files
from latentac.system.scratch import hidden_folder


def given_settings(fields: dict[str, Any], code: bytes) -> dict[str, str]:
    """What decides whether a run is the same: the configuration as it was given, and the user's own code."""
    return {"config": resolve(fields).hash, "package": packages.digest(code) if code else ""}


def publish_prepared(
    run: str, store: Store, output: Path, fields: dict[str, Any], code: bytes, started: float
) -> Manifest:
    """Check and fetch what the run needs, and publish it. started: by `time.monotonic`."""
    from latentac.runs.preparation import prepare as preparation
    from latentac.runs.preparation.guidance import compare_guidance
    from latentac.runs.preparation.rehearsal import rehearse
    from latentac.runs.resolution import resolve_all
    from latentac.sampling.devices import pick_device
    from latentac.worlds.prompts import load_prompts

    (output / run).mkdir(parents=True, exist_ok=True)
    with hidden_folder(output / run, "prepare") as temporary:
        folder = temporary
        if code:
            packages.unpack(code, folder / PACKAGE)
            packages.make_unpacked_importable(folder / PACKAGE)
        extensions = resolve_all(fields)
        settings = extensions.config
        preparation.check_machine(settings.backbone.device, settings.serving.port)
        store.probe()
        prompts = load_prompts(with_local_files(settings.prompts))
        preparation.fetch_rewards(extensions.rewards)
        preparation.check_known(extensions.rewards)
        described = preparation.fetch_backbone(settings, folder / "backbone", output, store.url, len(prompts.train))
        rehearsed = rehearse(
            settings, folder / "backbone", prompts.train[0].text, pick_device(settings.backbone.device)
        )
        preparation.check_scoring(extensions.rewards, prompts, rehearsed.images[0], settings.train.block_images)
        guidance = compare_guidance(settings, rehearsed.backbone, extensions.rewards, prompts)
        write_json(folder / "backbone.json", {**described, **rehearsed.to_dict(), "guidance": guidance})
        write_json(folder / "lengths.json", preparation.check_lengths(settings, prompts, rehearsed.backbone))
        write_json(folder / "config.json", settings.model_dump())
        write_json(folder / EXTENSIONS, extensions.described())
        (folder / "prompts.json").write_text(prompts.to_json())
        write_json(folder / "environment.json", preparation.environment())
        return store.publish(
            f"{run}/prepare",
            folder,
            run=run,
            step="prepare",
            config_hash=settings.hash,
            metrics={"seconds": time.monotonic() - started, "given": given_settings(fields, code)},
            owned=True,
        )
