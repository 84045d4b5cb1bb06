"""Step 5, steer: what the critic adds at sampling time, reward against network evaluations."""

from kfp.dsl import Artifact, Input, Output, component

from components import IMAGE


@component(base_image=IMAGE, install_kfp_package=False)
def steer(run: str, store: str, output: str, trained: Input[Artifact], manifest: Output[Artifact]) -> None:
    """Benchmark the steering methods on the trained policy; publish the table and a gallery.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        trained: manifest of train.
        manifest: manifest of the published artifact.
    """
    from latentac.task import pipeline_task

    with pipeline_task("steer", run, output, manifest.path) as publish:
        from latentac.run import steer

        publish(steer(run=run, store=store, output=output))
