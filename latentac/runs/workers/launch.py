"""Training as a TorchX app: elastic workers under a real torchrun agent, on this machine."""

import logging
import os
import re
import shlex
import sys
import time
from pathlib import Path

from torchx import specs
from torchx.components import dist
from torchx.runner import Runner, get_runner

from latentac.runs import failures
from latentac.runs.preparation.memory import compute_device, count_workers
from latentac.runs.workspace import Workspace
from latentac.system.errors import TrainingError, restore
from latentac.system.lifetime import keeping_signals
from latentac.system.reading import read_record
from latentac.system.scratch import hidden_folder, remove_hidden

LAST_LINES = 20
LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.2
_RESUME = "Resume the run: it continues from its last checkpoint"
_log = logging.getLogger(__name__)


def app(run: str, store: str, output: str, failure: Path, num_workers: int, max_restarts: int) -> specs.AppDef:
    """One node with `num_workers` elastic workers; lost workers are started again up to `max_restarts` times.

    failure: where a worker leaves an expected error.
    """
    definition = dist.torchrun(
        run,
        store,
        output,
        str(failure),
        m="latentac.runs.workers.supervisor",
        name=f"latentac/{run}",
        image=os.getcwd(),  # local_cwd runs in the current folder
        j=f"1x{num_workers}",
        env={
            "PET_MAX_RESTARTS": str(max_restarts),
            "PET_MONITOR_INTERVAL": "0.5",
            "PET_LOG_DIR": str(failure.parent),  # else below TMPDIR
            # All workers are on this machine. By default they look each other up by its hostname, which resolves
            # neither on every machine nor in every container: without an answer they would wait for ever.
            "PET_LOCAL_ADDR": LOOPBACK,
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            # Without it a re-rendezvous waits a minute for a store that died with the lost worker (torch 2.13).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            # One arithmetic thread a worker: they are as many as the cores.
            "OMP_NUM_THREADS": "1",
        },
    )
    # The agent is not ours, so it is started under our rule that no process outlives its owner.
    (command,) = definition.roles[0].args[1:]
    # Options of an agent around this process, such as a training operator's, are none of ours.
    foreign = [name for name in os.environ if name.startswith("PET_") and name not in definition.roles[0].env]
    unset = "".join(f"-u {shlex.quote(name)} " for name in sorted(foreign))
    agent = f"exec env {unset}{shlex.quote(sys.executable)} -m latentac.system.lifetime torch.distributed.run"
    command = command.replace("torchrun", agent, 1).replace("localhost", LOOPBACK, 1)  # the rendezvous' endpoint
    definition.roles[0].args = ["-c", command]
    return definition


def run_app(space: Workspace) -> None:
    """Run the training app to its end, its log lines passed on.

    Raises what a worker left, or TrainingError.
    """
    try:
        _run_app(space)
    finally:
        remove_hidden(space.folder)  # of a worker that was ended while it wrote a checkpoint


def _run_app(space: Workspace) -> None:
    run, train = space.run, space.config.train
    with hidden_folder(space.folder, "train") as folder, get_runner() as runner:  # which ends the app in any case
        failure, logs = folder / "failure.json", folder / "logs"
        output = str(space.folder.parent)
        workers = count_workers(train, compute_device(space.config.backbone))
        definition = app(run, space.store.url, output, failure, workers, train.max_restarts)
        with keeping_signals():  # torchx turns them into exceptions of its own
            handle = runner.run(definition, "local_cwd", {"log_dir": str(logs)})
        state, lines = _follow(runner, handle, logs, failure)
        if failure.exists():
            raise restore(read_record(failure))
        if state != specs.AppState.SUCCEEDED:
            met = failures.noted(folder)
            if met:
                raise TrainingError(f"training app of {run}", f"ended {state.name}: {met}", _RESUME)
            raise TrainingError(
                f"training app of {run}",
                f"ended {state.name}; the last lines of its log:\n" + "\n".join(lines),
                _RESUME,
            )


def _follow(runner: Runner, handle: str, logs: Path, failure: Path) -> tuple[specs.AppState, list[str]]:
    """Pass the agent's stderr on until the app ends or a worker reports an error that a restart would repeat."""
    position, last = 0, [""]
    while True:
        status = runner.status(handle)
        state = status.state if status else specs.AppState.UNKNOWN
        found = sorted(logs.rglob("stderr.log"))
        if found:
            with open(found[0], errors="replace") as stream:
                stream.seek(position)
                text = stream.read()
                position = stream.tell()
            lines = [re.sub(r"^\[\w*\d+\]:", "", line) for line in text.splitlines()]  # the agent's mark of the worker
            last = [*last, *lines][-LAST_LINES:]
            for line in lines:
                _log.info(line)
        if specs.is_terminal(state) or failure.exists():
            return state, last
        time.sleep(_POLL_SECONDS)
