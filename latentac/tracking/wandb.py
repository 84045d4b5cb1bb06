"""Weights & Biases: a run whose id is the run's, so that it goes on where it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentac.extensions import Settings


class WandB:
    """Metrics, configuration and pictures of a run, through `wandb`."""

    class Settings(Settings):
        """project, entity, group, tags: as in wandb.init; WANDB_PROJECT and its like count where none is named, and
        the project else is `latentac`. mode: `offline` writes to `<output>/<run>/wandb`, for `wandb sync`; WANDB_MODE
        where none is named. images: pictures are sent too. The API key comes from WANDB_API_KEY or `wandb login`."""

        project: str | None = None
        entity: str | None = None
        group: str | None = None
        tags: list[str] = []
        mode: Literal["online", "offline", "disabled"] | None = None
        images: bool = True

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._run: Any = None

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        import os

        import wandb

        chosen = self._settings
        self._run = wandb.init(
            id=run,
            name=run,
            resume="allow",
            project=chosen.project or os.environ.get("WANDB_PROJECT") or "latentac",
            entity=chosen.entity,
            group=chosen.group,
            tags=chosen.tags,
            mode=chosen.mode,
            dir=str(self._folder),
            config=dict(settings),
            # No terminal of a user is here: nothing is asked, printed or taken from what the steps print.
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=45, disable_git=True, x_disable_stats=True
            ),
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)  # of a step that is behind the last one nothing is taken
        self._run.summary.update({name: value for name, value in scalars.items() if name.startswith("evaluation/")})

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        if self._settings.images:
            import wandb

            self._run.log({name: wandb.Image(picture)}, step=step)

    def finish(self) -> None:
        self._run.finish()
