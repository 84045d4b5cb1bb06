"""Step 5, steer: what the critic adds at sampling time, reward against network evaluations."""

from kfp.dsl import HTML, Artifact, Input, Metrics, Output, component

from latentac.components import TRAIN


@component(base_image=TRAIN, install_kfp_package=False)
def steer(
    *,
    run: str,
    store: str,
    output: str,
    trained: Input[Artifact],
    manifest: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
) -> None:
    """Benchmark the steering methods on the trained policy; publish the table and a gallery.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        trained: manifest of train.
        manifest: manifest of the published artifact.
        metrics: reward of plain sampling and of the best arm, and what that arm costs.
        page: the same with images.
    """
    from pathlib import Path

    from latentac.runs.task import pipeline_task

    with pipeline_task("steer", run, output, manifest.path) as publish:
        from latentac.runs.reporting.report import numbers, step_page
        from latentac.runs.steps import steer
        from latentac.runs.workspace import default_store

        published = publish(steer(run=run, store=store, output=output))
        for name, value in numbers(published).items():
            metrics.log_metric(name, value)
        Path(page.path).write_text(step_page("steer", run, store or default_store(output)), encoding="utf-8")
