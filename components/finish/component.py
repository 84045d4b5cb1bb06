"""Step 8, finish: runs when the others have ended, well or not. Nothing is left running, and the report is written."""

from kfp.dsl import HTML, Artifact, Markdown, Output, component

from latentac.components import PIPELINE


@component(base_image=PIPELINE, install_kfp_package=False)
def finish(
    run: str, store: str, output: str, manifest: Output[Artifact], report: Output[HTML], card: Output[Markdown]
) -> None:
    """Stop what the run left on the cluster; publish the report of what it has published.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        manifest: manifest of the published artifact.
        report: the report as one page.
        card: the model card.
    """
    import shutil
    from pathlib import Path

    from latentac.components.finish.cleanup import clear
    from latentac.runs.task import pipeline_task

    with pipeline_task("finish", run, output, manifest.path) as publish:
        from latentac.runs.steps import finish

        try:
            clear(run)
        finally:
            published = finish(run=run, store=store, output=output)
            if published is not None:  # a run that failed in its first step has nothing to show
                publish(published)
                shutil.copyfile(Path(output) / run / "report.html", report.path)
                shutil.copyfile(Path(output) / run / "card.md", card.path)
