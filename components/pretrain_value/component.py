"""Step 2, pretrain-value: the critic learns what the frozen policy's images will be worth."""

from kfp.dsl import Artifact, Input, Metrics, Output, component

from latentac.components import TRAIN


@component(base_image=TRAIN, install_kfp_package=False)
def pretrain_value(
    run: str,
    store: str,
    output: str,
    prepared: Input[Artifact],
    manifest: Output[Artifact],
    metrics: Output[Metrics],
) -> None:
    """Regress the critic's heads on rollouts of the frozen policy; publish them with their explained variance a step.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        prepared: manifest of prepare.
        manifest: manifest of the published artifact.
        metrics: explained variance of each denoising step, the noisiest first.
    """
    from latentac.runs.task import pipeline_task

    with pipeline_task("pretrain-value", run, output, manifest.path) as publish:
        from latentac.runs.reporting.report import numbers
        from latentac.runs.steps import pretrain_value

        published = publish(pretrain_value(run=run, store=store, output=output))
        for name, value in numbers(published).items():
            metrics.log_metric(name, value)
