"""Step 4, evaluate: base against trained on held-out prompts and fixed seeds."""

from kfp.dsl import Artifact, Input, Output, component

from components import IMAGE


@component(base_image=IMAGE, install_kfp_package=False)
def evaluate(run: str, store: str, output: str, trained: Input[Artifact], manifest: Output[Artifact]) -> None:
    """Measure every reward on base and trained, with intervals; publish the numbers and a gallery.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        trained: manifest of train.
        manifest: manifest of the published artifact.
    """
    from latentac.task import pipeline_task

    with pipeline_task("evaluate", run, output, manifest.path) as publish:
        from latentac.run import evaluate

        publish(evaluate(run=run, store=store, output=output))
