"""Step 6, gate: promote or hold, with reasons."""

from kfp.dsl import Artifact, Input, Output, component

from components import IMAGE


@component(base_image=IMAGE, install_kfp_package=False)
def gate(
    run: str, store: str, output: str, evaluated: Input[Artifact], steered: Input[Artifact], manifest: Output[Artifact]
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
    """
    from latentac.task import pipeline_task

    with pipeline_task("gate", run, output, manifest.path) as publish:
        from latentac.run import gate

        decided = publish(gate(run=run, store=store, output=output))
    return str(decided.metrics["decision"])
