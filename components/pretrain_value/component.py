"""Step 2, pretrain-value: the critic learns what the frozen policy's pictures will be worth."""

from kfp.dsl import Artifact, Input, Output, component

from components import IMAGE


@component(base_image=IMAGE, install_kfp_package=False)
def pretrain_value(run: str, store: str, output: str, prepared: Input[Artifact], manifest: Output[Artifact]) -> None:
    """Regress the critic's heads on rollouts of the frozen policy; publish them with their explained variance a step.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        prepared: manifest of prepare.
        manifest: manifest of the published artifact.
    """
    from latentac.task import pipeline_task

    with pipeline_task("pretrain-value", run, output, manifest.path) as publish:
        from latentac.run import pretrain_value

        publish(pretrain_value(run=run, store=store, output=output))
