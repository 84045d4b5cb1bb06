"""`latentac pipeline ...`: the pipeline on a cluster, through the API of Kubeflow Pipelines. Imports are lazy.

An entry point of the group `latentac.commands` leads here: the library itself knows nothing of kfp.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.system.errors import ClusterError, ConfigError, Problem
from latentac.system.reading import seconds, whole
from latentac.system.steps import NAMES

if TYPE_CHECKING:
    from latentac.components.cluster.settings import Cluster
    from latentac.pipelines.following import Follower
    from latentac.pipelines.service import Order, Service

_PROGRAM = "latentac pipeline"
_HOST = "--host http://localhost:8888"
_ENVIRONMENT = """environment:
  KF_PIPELINES_ENDPOINT   the address, instead of --host
  LATENTAC_KFP_TOKEN      bearer token; LATENTAC_KFP_COOKIE: a session's cookie
  LATENTAC_CLUSTER        a cluster.yaml, instead of --cluster-settings
  KUBECONFIG              access to the cluster, for --release and to show what pods wait for"""


def main(arguments: list[str]) -> None:
    """Run one command. Raises LatentacError."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="The pipeline on a cluster with Kubeflow Pipelines and an installed chart (helm/latentac).",
        epilog=f"example:\n  {_PROGRAM} submit {_HOST} --release latentac --kube-namespace latentac --follow\n\n"
        f"{_ENVIRONMENT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_subparsers(metavar="command", required=True)
    release = "--release latentac --kube-namespace latentac"

    compiling = _add(group, "compile", "write the YAML for a cluster", f"{release} --to latentac.yaml", _compile)
    _add_cluster(compiling)
    compiling.add_argument("--to", type=Path, required=True, metavar="FILE", help="the pipeline's YAML")
    compiling.add_argument("--manifests", type=Path, metavar="FILE", help="also write Kubernetes objects to this file")

    upload = _add(group, "upload", "upload the pipeline, if it has changed", f"{_HOST} {release}", _upload)
    submit = _add(
        group, "submit", "start a run", f"{_HOST} {release} --recipe shapes-unet-smoke --set seed=1 --follow", _submit
    )
    schedule = _add(group, "schedule", "start runs on a schedule", f"{_HOST} {release} --cron '0 0 3 * * 1'", _schedule)
    for each in (upload, submit, schedule):
        _add_host(each)
        _add_cluster(each)
    for each in (submit, schedule):
        _add_request(each)
    submit.add_argument("--run", help="the run's id (default: <recipe>-<UTC time>); a known id continues that run")
    submit.add_argument("--follow", action="store_true", help="wait until the run ends")
    _add_bounds(submit)
    schedule.add_argument("--cron", required=True, help="times: second minute hour day month weekday")
    schedule.add_argument("--name", default="latentac", help="name of the schedule (default: %(default)s)")

    follow = _add(group, "follow", "show the progress of a run until it ends", f"{_HOST} 8f14e45f-ceea-467f", _follow)
    _add_bounds(follow)
    report = _add(group, "report", "fetch a run's report", f"{_HOST} 8f14e45f-ceea-467f --to report.html", _report)
    report.add_argument("--to", type=Path, required=True, metavar="FILE", help="the page")
    report.add_argument("--store", default="", metavar="URL", help="the store (default: the run's own)")
    cancel = _add(group, "cancel", "stop a run and its training job", f"{_HOST} {release} 8f14e45f-ceea", _cancel)
    runs = _add(group, "runs", "list the newest runs", _HOST, _runs)
    runs.add_argument("--count", type=whole(1, 1000), default=10, metavar="N", help="how many (default: %(default)s)")
    for each in (follow, report, cancel, runs):
        _add_host(each)
    for each in (follow, cancel):
        _add_cluster(each)
    for each in (follow, report, cancel):
        each.add_argument("id", help="the run's id in Kubeflow Pipelines, which submit prints")
    return parser


def _add(
    group: Any, name: str, summary: str, example: str, command: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {_PROGRAM} {name} {example}\n\n{_ENVIRONMENT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", metavar="URL", help="the API of Kubeflow Pipelines")
    parser.add_argument("--namespace", default="", help="your namespace, if the host has several users")
    parser.add_argument("--ca", default="", metavar="FILE", help="certificate authority of the host")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster-settings", type=Path, metavar="FILE", help="the release's cluster.yaml")
    parser.add_argument("--release", default="", metavar="NAME", help="release of the chart to read the settings from")
    parser.add_argument(
        "--kube-namespace", default="", metavar="NS", help="namespace of the release in the KUBECONFIG's cluster"
    )


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="shapes-unet", help="named configuration (default: %(default)s)")
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file that overrides the recipe")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="one field; may be repeated")
    parser.add_argument("--project", default="", metavar="NAME", help="the same as --set project=NAME")
    parser.add_argument(
        "--package", type=Path, metavar="DIR", help="your own code (at most 48 KiB packed), importable in each step"
    )
    parser.add_argument("--experiment", default="latentac", help="experiment in the UI (default: %(default)s)")
    parser.add_argument("--pipeline-root", default="", metavar="URL", help="root of KFP's artifacts (default: KFP's)")


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pending-seconds", type=seconds, default=900.0, metavar="S", help="wait for a pod (default: %(default)s)"
    )
    parser.add_argument(
        "--poll-seconds", type=seconds, default=3.0, metavar="S", help="time between polls (default: %(default)s)"
    )
    parser.add_argument("--total-seconds", type=seconds, metavar="S", help="limit of the whole run (default: none)")


def _compile(options: argparse.Namespace) -> None:
    from latentac.pipelines.cluster import compile_manifests, compile_pipeline

    settings = _settings(options)
    print(compile_pipeline(settings, options.to))
    if options.manifests:
        compile_manifests(settings, options.manifests)


def _upload(options: argparse.Namespace) -> None:
    _uploaded(_service(options), _settings(options))


def _submit(options: argparse.Namespace) -> None:
    from latentac.system.names import working_folder

    name = _new_id(options.recipe) if options.run is None else options.run
    working_folder(name, "")  # refused here, where it costs nothing
    settings, service = _settings(options), _service(options)
    parameters = {"run": name, **_parameters(options, settings), **_places(settings)}
    version = _uploaded(service, settings)
    started = service.submit(_order(options, settings, name, version, parameters))
    _say(f"run {started}, {name}: {service.host}/#/runs/details/{started}")
    if options.follow:
        _finish(_follower(options, service, settings).follow(started), started)
    else:
        _say(f"follow with: {_PROGRAM} follow {started}")


def _schedule(options: argparse.Namespace) -> None:
    settings, service = _settings(options), _service(options)
    if len(options.cron.split()) != 6:
        remedy = "Write second minute hour day month weekday, as in '0 0 3 * * 1' for Mondays at 3."
        raise ConfigError([Problem("--cron", options.cron, "has not six fields", remedy)])
    version = _uploaded(service, settings, own_id=True)
    parameters = {"run": "-", **_parameters(options, settings), **_places(settings)}
    made = service.schedule(_order(options, settings, options.name, version, parameters), options.cron)
    _say(f"schedule {made}, {options.name}: {service.host}/#/recurringrun/details/{made}")


def _order(
    options: argparse.Namespace, settings: "Cluster", name: str, version: tuple[str, str], parameters: dict[str, Any]
) -> "Order":
    from latentac.pipelines.service import Order

    return Order(name, version, parameters, settings.steps.service_account, options.experiment, options.pipeline_root)


def _follow(options: argparse.Namespace) -> None:
    service = _service(options)
    settings = _settings(options) if _named(options) else None
    _finish(_follower(options, service, settings).follow(options.id), options.id)


def _report(options: argparse.Namespace) -> None:
    from latentac.pipelines.managing import name_of, parameters_of
    from latentac.store import open_store
    from latentac.system.scratch import write_whole

    service = _service(options)
    found = service.run(options.id)
    run, store = name_of(found), options.store or str(parameters_of(found).get("store") or "")
    if not store:
        raise ConfigError([Problem("--store", "", f"run {options.id} does not name its store", "Name it.")])
    with tempfile.TemporaryDirectory() as folder:
        open_store(store).fetch(f"{run}/finish", Path(folder) / "finish")
        options.to.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.to, (Path(folder) / "finish" / "report.html").read_bytes())
    _say(str(options.to))


def _cancel(options: argparse.Namespace) -> None:
    from latentac.pipelines.managing import cancel

    cancel(_service(options), options.id, _settings(options) if _named(options) else None, _say)


def _runs(options: argparse.Namespace) -> None:
    from latentac.pipelines.managing import listed

    for line in listed(_service(options), options.count):
        _say(line)


def _finish(state: str, run_id: str) -> None:
    if state != "SUCCEEDED":
        problem = "was cancelled" if state == "CANCELED" else "failed; the reasons are above"
        remedy = "Submit it again with the same --run; finished steps are not repeated"
        raise ClusterError(f"run {run_id}", problem, remedy)
    _say(f"report with: {_PROGRAM} report {run_id} --to report.html")


def _service(options: argparse.Namespace) -> "Service":
    from latentac.pipelines.service import ENDPOINT, Service

    return Service(options.host or os.environ.get(ENDPOINT, "").strip(), options.namespace, options.ca)


def _named(options: argparse.Namespace) -> bool:
    from latentac.components.cluster.settings import SETTINGS

    return bool(options.cluster_settings or options.release or os.environ.get(SETTINGS))


def _settings(options: argparse.Namespace) -> "Cluster":
    """The settings of the release that is named: a file, a release of the chart, or the environment's file."""
    from latentac.components.cluster.settings import KEY, here, parse, read

    if options.cluster_settings:
        return read(options.cluster_settings)
    if options.release:
        from latentac.components.cluster.api import CONFIG_MAPS, connect

        name, namespace = f"{options.release}-cluster", options.kube_namespace or "default"
        found = connect(namespace).get(CONFIG_MAPS, name)
        if found is None or KEY not in (found.get("data") or {}):
            remedy = "Name the chart's release and its namespace: `helm list -A` shows them."
            problem = f"there is no ConfigMap {namespace}/{name} with {KEY}"
            raise ConfigError([Problem("--release", options.release, problem, remedy)])
        return parse(found["data"][KEY], f"{name}/{KEY}")
    if settings := here():
        return settings
    remedy = "Name its file, or --release and --kube-namespace."
    raise ConfigError([Problem("--cluster-settings", None, "no cluster is named", remedy)])


def cluster_settings(words: list[str]) -> "Cluster":
    """The settings of the release that the options of `submit` name."""
    return _settings(_parser().parse_args(["submit", *words]))


def _uploaded(service: "Service", settings: "Cluster", *, own_id: bool = False) -> tuple[str, str]:
    from latentac.pipelines.cluster import compile_pipeline
    from latentac.pipelines.pipeline import NAME

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{NAME}.yaml"
        name = compile_pipeline(settings, file, own_id=own_id)
        pipeline, version, made = service.upload(file, NAME, name)
    _say(f"pipeline {NAME}, version {name}{'' if made else ' (there already)'}")
    return pipeline, version


def _parameters(options: argparse.Namespace, settings: "Cluster") -> dict[str, Any]:
    """What the run is asked to do, checked here, where a mistake costs nothing. A file stays here, its fields go."""
    from latentac.components.deploy.inference_service import check_project
    from latentac.config.fields import read_file
    from latentac.runs.configuration import resolve_recipe
    from latentac.runs.package import inline, pack, use_in_place

    code = {"package": inline(pack(options.package))} if options.package else {}
    if options.package:
        use_in_place(options.package)
    fields = read_file(Path(options.config)) if options.config else {}
    given = [*options.set, *([f"project={json.dumps(options.project)}"] if options.project else [])]
    project = resolve_recipe(options.recipe, options.config, given).project  # may be the file's name, which stays here
    check_project(settings, None, project)
    overrides = [*(f"{path}={json.dumps(value)}" for path, value in _leaves(fields)), *options.set]
    if options.config or options.project:
        overrides.append(f"project={json.dumps(project)}")
    return {"recipe": options.recipe, "overrides": overrides, **code}


def _leaves(fields: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in fields.items():
        path = f"{before}{name}"
        found += _leaves(value, f"{path}.") if isinstance(value, dict) and value else [(path, value)]
    return found


def _places(settings: "Cluster") -> dict[str, str]:
    from latentac.pipelines.cluster import WORK

    return {"store": settings.store.url, "output": WORK}


def _new_id(recipe: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', recipe)}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def _follower(options: argparse.Namespace, service: "Service", settings: "Cluster | None") -> "Follower":
    from latentac.pipelines.following import Follower

    follower = Follower(
        service,
        NAMES,
        _say,
        pending_seconds=options.pending_seconds,
        poll_seconds=options.poll_seconds,
        total_seconds=options.total_seconds,
    )
    if settings is not None:
        from latentac.pipelines.pods import Pods

        pods = Pods(settings.steps.namespace, NAMES, _say)
        follower.troubles, follower.last_words = pods.troubles, pods.last_words
    return follower


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
