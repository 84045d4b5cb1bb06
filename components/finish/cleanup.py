"""What a run may have left on a cluster when it ends early: a training job that goes on, a release half made."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentac.components.cluster.settings import Cluster


def clear(run: str, settings: "Cluster | None" = None) -> list[str]:
    """Stop the run's training job and take an unfinished release back; nothing off a cluster. Returns what was done, in
    words. Raises ClusterError.

    settings: of the cluster; by default those of the cluster around this process. A step that is cancelled gets no time
    to do it itself. So the step `finish` does it, and `latentac pipeline cancel`, because Argo does not always run
    `finish` after a cancel.
    """
    from latentac.components.cluster.settings import here

    settings, done = settings or here(), list[str]()
    if settings is None:
        return done
    from latentac.components.deploy.rollout import abandon
    from latentac.components.train.volcano import abort

    try:
        done += [f"training job {settings.namespace}/{name} is stopped" for name in abort(settings, run)]
    finally:  # each is tried, whatever becomes of the other
        if abandon(settings, run):
            done.append(f"the unfinished release of {settings.deploy.name} is undone")
    return done
