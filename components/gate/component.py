"""Step 6, gate: promote or hold, with reasons."""

from kfp.dsl import Artifact, Input, Markdown, Metrics, Output, component

from latentac.components import PIPELINE


@component(base_image=PIPELINE, install_kfp_package=False)
def gate(
    *,
    run: str,
    store: str,
    output: str,
    evaluated: Input[Artifact],
    steered: Input[Artifact],
    manifest: Output[Artifact],
    metrics: Output[Metrics],
    reasons: Output[Markdown],
) -> str:
    """Decide whether the trained policy may be served; publish the checks and the reasons.

    Returns `promote` or `hold`.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        evaluated: manifest of evaluate.
        steered: manifest of steer.
        manifest: manifest of the published artifact.
        metrics: how many checks passed and failed.
        reasons: the checks as a table.
    """
    from pathlib import Path

    from latentac.runs.task import pipeline_task

    with pipeline_task("gate", run, output, manifest.path) as publish:
        from latentac.runs.reporting.report import gate_reasons, numbers
        from latentac.runs.steps import gate
        from latentac.runs.workspace import default_store

        decided = publish(gate(run=run, store=store, output=output))
        for name, value in numbers(decided).items():
            metrics.log_metric(name, value)
        Path(reasons.path).write_text(gate_reasons(run, store or default_store(output)), encoding="utf-8")
    return str(decided.metrics["decision"])
