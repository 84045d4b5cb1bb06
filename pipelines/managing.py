"""Runs that were submitted, by their ids in Kubeflow Pipelines: listed, and cancelled with what they left."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from latentac.pipelines.following import OVER, state_of
from latentac.pipelines.service import Service
from latentac.system.errors import ClusterError

if TYPE_CHECKING:
    from latentac.components.cluster.settings import Cluster

_LOOKED_THROUGH = 200
"""Runs, the newest ones, among which one that continues another is looked for."""


def parameters_of(run: Any) -> dict[str, Any]:
    """What the run was started with."""
    return dict((run.runtime_config and run.runtime_config.parameters) or {})


def name_of(run: Any) -> str:
    """The id that the run has in its store. A scheduled one has the id that KFP gave it."""
    named = str(parameters_of(run).get("run") or "-")
    return str(run.run_id) if named == "-" else named


def listed(service: Service, count: int) -> list[str]:
    """The newest `count` runs, a line each: id, time, state, name."""
    lines = []
    for run in service.runs(count):
        if str(run.state) == "FAILED" and not run.state_history:  # only the history tells that it was cancelled
            run = service.run(str(run.run_id))
        named = parameters_of(run).get("run") or run.display_name
        # The id of a scheduled run stands in the first column already.
        name = f"{run.display_name} (scheduled)" if named == "-" else named
        lines.append(f"{run.run_id}  {run.created_at:%Y-%m-%d %H:%M}  {state_of(run):<10}  {name}")
    return lines


def cancel(service: Service, run_id: str, settings: "Cluster | None", say: Callable[[str], None]) -> None:
    """Stop a run, and what it may have left on the cluster of `settings`: its training job, an unfinished release.

    Of a run that is over, only the latter. Raises ClusterError, also where another run continues this one.
    """
    run = service.run(run_id)
    state, name = state_of(run), name_of(run)
    if state in OVER:
        say(f"run {run_id}: {state} already")
        heirs = [each for each in service.runs(_LOOKED_THROUGH) if name_of(each) == name and state_of(each) not in OVER]
        if heirs:
            problem = f"it is over, and run {heirs[0].run_id} continues {name}: its training job is that one's"
            raise ClusterError(f"run {run_id}", problem, f"To stop it, cancel {heirs[0].run_id}")
    else:
        service.terminate(run_id)
        say(f"run {run_id}: is cancelled")
    if settings is None:
        say(
            "nothing on the cluster was stopped from here, because no release is named (--release, --kube-namespace). "
            "The step `finish` does that if Argo runs it. Otherwise the training job ends after train.leaseSeconds"
        )
        return
    from latentac.components.finish.cleanup import clear

    for line in clear(name, settings) or [f"no training job and no unfinished release of {name} is left"]:
        say(line)
