"""Weights & Biases: a run whose id is the run's, so that it goes on where it was."""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentac.config import extensions
from latentac.system.lifetime import children
from latentac.system.waiting import within

_TEARDOWN_SECONDS = 5.0
_OPEN: set["WandB"] = set()


class WandB:
    """Metrics, configuration and images of a run, through `wandb`."""

    class Settings(extensions.Settings):
        project: str | None = None
        """Name of the project. By default WANDB_PROJECT, else `latentac`."""
        entity: str | None = None
        """User or team that the project belongs to. By default WANDB_ENTITY."""
        group: str | None = None
        """Name of a group of runs, such as those of a sweep."""
        tags: list[str] = []
        """Tags of the run."""
        mode: Literal["online", "offline", "disabled"] | None = None
        """`offline` writes to `<output>/<run>/wandb`, for `wandb sync`. By default WANDB_MODE. The key comes from
        WANDB_API_KEY or `wandb login`."""
        images: bool = True
        """Whether images are also sent."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._run: Any = None
        self.address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its errors are nobody's business but the user's

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
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

        _OPEN.add(self)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)  # of a step that is behind the last one nothing is taken
        self._run.summary.update({name: value for name, value in scalars.items() if name.startswith("evaluation/")})

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        if self._settings.images:
            import wandb

            self._run.log({name: wandb.Image(image)}, step=step)

    def finish(self) -> None:
        self._run.finish()
        _OPEN.discard(self)
        if not _OPEN:
            _tear_down()  # `finish` returns before the service has written the file of an offline run

    def abandon(self) -> None:
        """End the process that wandb has started: when the interpreter ends, wandb waits for it without a bound."""
        _OPEN.discard(self)
        if _OPEN:  # another tracker uses it, too
            return
        for pid, command in children():
            if "wandb-core" in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(Exception):  # it finds its process gone, and leaves nothing to do for the end
            within(_TEARDOWN_SECONDS, _tear_down)


def _tear_down() -> None:
    """Raises RuntimeError where wandb's process has failed. wandb itself ends the interpreter with that exit code."""
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:
        raise RuntimeError(f"wandb's process ended with exit code {error.code}") from None
