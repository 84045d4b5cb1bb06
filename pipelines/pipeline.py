"""The graph: prepare -> pretrain-value -> train -> evaluate -> steer -> gate -> deploy if promoted."""

from kfp import dsl

from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.gate.component import gate
from components.prepare.component import prepare
from components.pretrain_value.component import pretrain_value
from components.steer.component import steer
from components.train.component import train

STEPS = ("prepare", "pretrain-value", "train", "evaluate", "steer", "gate", "deploy")
"""The nodes, in the order in which they run."""


@dsl.pipeline(name="latentac", description="Train, evaluate, steer and serve a diffusion model with a latent critic.")
def latentac(
    run: str,
    store: str,
    recipe: str = "shapes-unet",
    config: str = "",
    overrides: list = [],  # noqa: B006 - KFP reads the default from the signature
    output: str = "runs",
) -> None:
    """Caching is off everywhere: a verb itself returns at once when its artifact is published already."""
    common = {"run": run, "store": store, "output": output}
    prepared = prepare(recipe=recipe, config=config, overrides=overrides, **common)
    pretrained = pretrain_value(prepared=prepared.outputs["manifest"], **common)
    trained = train(pretrained=pretrained.outputs["manifest"], **common)
    evaluated = evaluate(trained=trained.outputs["manifest"], **common)
    steered = steer(trained=trained.outputs["manifest"], **common).after(evaluated)
    gated = gate(evaluated=evaluated.outputs["manifest"], steered=steered.outputs["manifest"], **common)
    for task in (prepared, pretrained, trained, evaluated, steered, gated):
        task.set_caching_options(enable_caching=False)
    # "Output" is the name of a Python component's return value, the only output that kfp.local resolves in a condition.
    with dsl.If(gated.outputs["Output"] == "promote", name="promoted"):
        deploy(trained=trained.outputs["manifest"], **common).set_caching_options(enable_caching=False)
