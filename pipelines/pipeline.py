"""The graph: prepare -> pretrain-value -> train -> evaluate -> steer -> gate -> deploy if promoted; finish always."""

from collections.abc import Callable

from kfp import dsl

from latentac.components.deploy.component import deploy
from latentac.components.evaluate.component import evaluate
from latentac.components.finish.component import finish
from latentac.components.gate.component import gate
from latentac.components.prepare.component import prepare
from latentac.components.pretrain_value.component import pretrain_value
from latentac.components.steer.component import steer
from latentac.components.train.component import train

"""The nodes, in the order in which they run."""

NAME = "latentac"


def compose(place: Callable[[dsl.PipelineTask], object] | None = None, *, own_id: bool = False) -> dsl.base_component:
    """The one graph as a KFP pipeline, for each of the ways to run it.

    place: called with every task, to say where it runs (image, resources, secrets). own_id: the run's id is the one
    that KFP gives it, whatever `run` is: for recurring runs, which all have the same parameters. (A part of a string
    would not be replaced by the backend, so it is that id and nothing else.)
    """

    @dsl.pipeline(name=NAME, description="Train, evaluate, steer and serve a diffusion model with a latent critic.")
    def latentac(
        run: str,
        store: str = "",
        recipe: str = "shapes-unet",
        config: str = "",
        overrides: list = [],  # noqa: B006 - KFP reads the default from the signature
        package: str = "",
        output: str = "runs",
    ) -> None:
        """Caching is off everywhere: a step itself returns at once when its artifact is published already."""
        common = {"run": dsl.PIPELINE_JOB_ID_PLACEHOLDER if own_id else run, "store": store, "output": output}
        finished = finish(**common)
        with dsl.ExitHandler(finished, name="steps"):
            prepared = prepare(recipe=recipe, config=config, overrides=overrides, package=package, **common)
            pretrained = pretrain_value(prepared=prepared.outputs["manifest"], **common)
            trained = train(pretrained=pretrained.outputs["manifest"], **common)
            evaluated = evaluate(trained=trained.outputs["manifest"], **common)
            steered = steer(trained=trained.outputs["manifest"], **common).after(evaluated)
            gated = gate(evaluated=evaluated.outputs["manifest"], steered=steered.outputs["manifest"], **common)
            # "Output" is the name of a Python component's return value, the only one that kfp.local resolves here.
            with dsl.If(gated.outputs["Output"] == "promote", name="promoted"):
                deployed = deploy(trained=trained.outputs["manifest"], **common)
        for task in (prepared, pretrained, trained, evaluated, steered, gated, deployed, finished):
            task.set_caching_options(enable_caching=False)
            if place is not None:
                place(task)

    return latentac


def compose_last(place: Callable[[dsl.PipelineTask], object] | None = None) -> dsl.base_component:
    """The last step alone, for a driver whose runner did not come to it. place: as for `compose`."""

    @dsl.pipeline(name=f"{NAME}-last")
    def last(run: str, store: str = "", output: str = "runs") -> None:
        finished = finish(run=run, store=store, output=output)
        finished.set_caching_options(enable_caching=False)
        if place is not None:
            place(finished)

    return last
