"""Step 4, evaluate: base, trained and the model in production on held-out prompts and fixed seeds."""

from kfp.dsl import HTML, Artifact, Input, Metrics, Output, component

from latentac.components import TRAIN


@component(base_image=TRAIN, install_kfp_package=False)
def evaluate(
    *,
    run: str,
    store: str,
    output: str,
    trained: Input[Artifact],
    manifest: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
) -> None:
    """Measure rewards, diversity and latency of each, with intervals; publish the numbers and a gallery.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        trained: manifest of train.
        manifest: manifest of the published artifact.
        metrics: rewards of each arm, gain, diversity kept, latency ratio.
        page: the same with images.
    """
    from pathlib import Path

    from latentac.runs.task import pipeline_task

    with pipeline_task("evaluate", run, output, manifest.path) as publish:
        from latentac.runs.reporting.report import numbers, step_page
        from latentac.runs.steps import evaluate
        from latentac.runs.workspace import default_store

        published = publish(evaluate(run=run, store=store, output=output))
        for name, value in numbers(published).items():
            metrics.log_metric(name, value)
        Path(page.path).write_text(step_page("evaluate", run, store or default_store(output)), encoding="utf-8")
