"""Step 1, prepare: a recipe becomes one checked configuration, a backbone and prompts in the store."""

from kfp.dsl import Artifact, Output, component

from latentac.components import TRAIN


@component(base_image=TRAIN, install_kfp_package=False)
def prepare(
    *,
    run: str,
    recipe: str,
    config: str,
    overrides: list,
    package: str,
    store: str,
    output: str,
    manifest: Output[Artifact],
) -> None:
    """Resolve and check the run's configuration; publish it with the backbone and the prompts.

    Args:
        run: id of the run, the first part of every key in the store.
        recipe: name of a complete configuration.
        config: path of a YAML file laid over the recipe, or empty.
        overrides: `path=value` strings laid over both.
        package: folder of the user's own code, or that folder packed as text, or empty.
        store: URL of the artifact store, `file://` or `s3://`.
        output: folder for the run's working files.
        manifest: manifest of the published artifact.
    """
    from latentac.runs.task import pipeline_task

    with pipeline_task("prepare", run, output, manifest.path) as publish:
        from latentac.runs.steps import prepare

        place = {"run": run, "store": store, "output": output}
        publish(prepare(recipe=recipe, config=config, overrides=overrides, package=package, **place))
