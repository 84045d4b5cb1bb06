"""The steps of a run, in order. Command line, pipeline, console and reports are made from this one table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step: a command of `latentac`, a function of `latentac.runs.steps`, a component of the pipeline.

    needs: the steps whose artifacts it reads.
    scores: it calls rewards in its own process. On a cluster such a step runs in the image with torch; the others
        launch, decide or report.
    optional: a run may end well without it.
    """

    name: str
    summary: str
    needs: tuple[str, ...] = ()
    scores: bool = False
    optional: bool = False

    @property
    def function(self) -> str:
        """Its name in Python."""
        return self.name.replace("-", "_")


STEPS = (
    Step("prepare", "resolve a recipe, check all that can be checked, fetch backbone and prompts", scores=True),
    Step("pretrain-value", "fit the critic to rollouts of the untrained policy", ("prepare",), scores=True),
    Step("train", "train policy and critic with PPO, as an elastic TorchX job", ("prepare", "pretrain-value")),
    Step("evaluate", "compare base and trained model on held-out prompts and fixed seeds", ("prepare", "train"), True),
    Step("steer", "measure reward against function evaluations for each steering method", ("prepare", "train"), True),
    Step("gate", "decide whether the trained model is promoted or held", ("evaluate", "steer")),
    Step("deploy", "export, serve with KServe, request a steered image, put the model into production",
         ("gate", "train"), optional=True),
    Step("finish", "write and publish the report of what the run has published, complete or not"),
)  # fmt: skip

NAMES = tuple(step.name for step in STEPS)
SCORING = tuple(step.name for step in STEPS if step.scores)
OPTIONAL = tuple(step.name for step in STEPS if step.optional)


def up_to(name: str) -> tuple[str, ...]:
    """The names of the steps from the first to `name`."""
    return NAMES[: NAMES.index(name) + 1]


def needs(name: str) -> tuple[str, ...]:
    """The steps whose artifacts the step reads."""
    return STEPS[NAMES.index(name)].needs
