"""Step 7, deploy: the promoted policy in a real model server, asked for one steered image."""

from kfp.dsl import Artifact, Input, Output, component

from latentac.components import PIPELINE


@component(base_image=PIPELINE, install_kfp_package=False)
def deploy(run: str, store: str, output: str, trained: Input[Artifact], manifest: Output[Artifact]) -> None:
    """Export, serve and question the trained policy; publish what was deployed and the image.

    On a cluster it is rolled out there: tried beside what serves, compared, promoted or taken back.

    Args:
        run: id of the run.
        store: URL of the artifact store.
        output: folder for the run's working files.
        trained: manifest of train.
        manifest: manifest of the published artifact.
    """
    from latentac.runs.task import pipeline_task

    with pipeline_task("deploy", run, output, manifest.path) as publish:
        from latentac.components.cluster.settings import here
        from latentac.runs.steps import deploy

        cluster, prove = here(), None
        if cluster is not None:
            from latentac.components.deploy.rollout import rollout

            prove = rollout(cluster)
        publish(deploy(run=run, store=store, output=output, prove=prove))
