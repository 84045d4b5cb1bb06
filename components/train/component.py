"""Step 3, train: PPO with the critic, as a TorchX app that resumes from its last checkpoint."""

from kfp.dsl import Artifact, Input, Output, component

from latentac.components import PIPELINE


@component(base_image=PIPELINE, install_kfp_package=False)
def train(run: str, store: str, output: str, pretrained: Input[Artifact], manifest: Output[Artifact]) -> None:
    """Train policy and critic; publish both with the history of the iterations.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        pretrained: manifest of pretrain-value.
        manifest: manifest of the published artifact.
    """
    from latentac.runs.task import pipeline_task

    with pipeline_task("train", run, output, manifest.path) as publish:
        from latentac.components.cluster.settings import here
        from latentac.runs.steps import train

        launch, settings = None, here()
        if settings is not None:
            from latentac.components.train.volcano import Volcano

            launch = Volcano(settings)
        publish(train(run=run, store=store, output=output, launch=launch))
