"""What a run may have left on a cluster when it ends early: a training job that goes on, a release half made."""


def clear(run: str) -> None:
    """Stop the run's training job and take an unfinished release back; nothing off a cluster. Raises ClusterError.

    A step that is cancelled gets no time to do it itself, and this task runs after a cancel too.
    """
    from latentac.components.cluster.settings import here

    settings = here()
    if settings is None:
        return
    from latentac.components.deploy.rollout import abandon
    from latentac.components.train.volcano import abort

    try:
        abort(settings, run)
    finally:  # each is tried, whatever becomes of the other
        abandon(settings, run)
