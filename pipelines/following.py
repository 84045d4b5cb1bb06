"""What a run on a cluster does, line by line as it happens, until it has ended or cannot go on."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from latentac.pipelines.pods import MAIN, attempt_of, without_attempt
from latentac.pipelines.service import Service
from latentac.system.errors import ClusterError, ClusterUnavailable

SUCCEEDED, FAILED, SKIPPED, PENDING, RUNNING = "SUCCEEDED", "FAILED", "SKIPPED", "PENDING", "RUNNING"
CANCELED = "CANCELED"
OVER = frozenset({SUCCEEDED, FAILED, CANCELED})
_STEP_OVER = frozenset({SUCCEEDED, FAILED, SKIPPED, CANCELED})

LAST = "finish"
"""The step that stops what a run left on the cluster."""

_LEFT = (
    "a training job and an unfinished release may be left. `latentac pipeline cancel {}` with --release and "
    "--kube-namespace stops both. Otherwise the job ends after train.leaseSeconds without its step"
)
Troubles = Callable[[str], list[str]]
"""A run's id -> what its pods wait for or died of, where Kubernetes can be asked; else it gives nothing."""


@dataclass
class Follower:
    """Follows one run. say: takes each line; pending_seconds: how long a pod may wait before we give up;
    outage_seconds: how long the server may not answer; total_seconds: for the whole run, None for no bound."""

    service: Service
    steps: tuple[str, ...]
    say: Callable[[str], None]
    troubles: Troubles = lambda run_id: []
    last_words: Troubles = lambda run_id: []
    pending_seconds: float = 900.0
    poll_seconds: float = 3.0
    total_seconds: float | None = None
    outage_seconds: float = 300.0
    _seen: dict[str, str] = field(default_factory=dict)
    _announced: dict[str, float] = field(default_factory=dict)
    _states: list[str] = field(default_factory=list)
    _waiting: float | None = None

    def follow(self, run_id: str) -> str:
        """SUCCEEDED, FAILED or CANCELED. Raises ClusterError where the run cannot go on, or takes too long."""
        began = time.monotonic()
        while True:
            run = self._read(run_id)
            details = list(run.run_details.task_details or []) if run.run_details else []
            self._announce(details)
            state = state_of(run)
            if state in OVER:
                return self._conclude(run_id, state)
            self._wait(run_id, run, details)
            if self.total_seconds is not None and time.monotonic() - began > self.total_seconds:
                remedy = "It goes on: follow it again, or cancel it"
                raise ClusterError(f"run {run_id}", f"has not ended in {self.total_seconds:.0f} s", remedy)
            time.sleep(self.poll_seconds)

    def _read(self, run_id: str) -> Any:
        began = time.monotonic()
        while True:
            try:
                return self.service.run(run_id)
            except ClusterUnavailable as error:
                passed = time.monotonic() - began
                if passed > self.outage_seconds:
                    problem, remedy = f"{error.problem}; no answer for {passed:.0f} s", "It may go on: follow it again"
                    raise ClusterUnavailable(error.where, problem, remedy) from error
                self.say(f"{error.where}: {error.problem}; trying again")
                time.sleep(self.poll_seconds)

    def _announce(self, details: list[Any]) -> None:
        """A line where a step has begun, and one where it has ended."""
        for number, step in enumerate(self.steps, start=1):
            label = f"[{number}/{len(self.steps)}] {step}"
            detail = _newest(details, step)
            if detail is None:
                continue
            before, now = self._seen.get(step), str(detail.state)
            if before is None and now in (RUNNING, *_STEP_OVER) and now != SKIPPED:
                self.say(label)
            if before in _STEP_OVER and now == RUNNING:
                self.say(f"{label} again")
            if before not in _STEP_OVER and now in _STEP_OVER:
                word = {SUCCEEDED: "done", SKIPPED: "skipped"}.get(now, "failed")
                self.say(f"{label} {word}{_took(detail)}")
            if now in (RUNNING, *_STEP_OVER):
                self._seen[step] = now

    def _wait(self, run_id: str, run: Any, details: list[Any]) -> None:
        """Tell what the pods wait for; give up when they have waited too long. KFP itself would wait for ever."""
        troubles = self.troubles(run_id)
        states = [str(run.state), *(str(detail.state) for detail in details)]
        if states != self._states or not (troubles or PENDING in states):
            self._states, self._waiting = states, None
        if not (troubles or PENDING in states):
            return
        now = time.monotonic()
        self._waiting = now if self._waiting is None else self._waiting
        for trouble in troubles:
            if now - self._announced.get(trouble, -3600.0) > 300.0:
                self._announced[trouble] = now
                self.say(f"      waits: {trouble}")
        if now - self._waiting > self.pending_seconds:
            reasons = troubles or _messages(self.service.nodes(run_id), self.steps, {"Pending"})
            problem = "; ".join(reasons) or "a pod is pending, and its namespace cannot be read from here"
            remedy = f"Correct that; it still waits, so cancel it: latentac pipeline cancel {run_id}"
            raise ClusterError(f"run {run_id}", f"waits for {self.pending_seconds:.0f} s: {problem}", remedy)

    def _conclude(self, run_id: str, state: str) -> str:
        for step in self.steps:
            if state == SUCCEEDED and step not in self._seen:
                self.say(f"[{self.steps.index(step) + 1}/{len(self.steps)}] {step} skipped")
        if state == FAILED:
            for line in _messages(self.service.nodes(run_id), self.steps, {"Failed", "Error"}):
                self.say(f"      {line}")
            for line in self.last_words(run_id):
                self.say(f"      {line}")
        if state != SUCCEEDED and self._seen.get(LAST) != SUCCEEDED:
            self.say(f"      {LAST} {'failed' if LAST in self._seen else 'did not run'}: {_LEFT.format(run_id)}")
        self.say(f"run {run_id}: {state}")
        return state


def state_of(run: Any) -> str:
    """A run that was cancelled ends as FAILED: only its history tells."""
    state = str(run.state)
    history = {str(entry.state) for entry in run.state_history or []}
    return CANCELED if state in (FAILED, CANCELED) and history & {"CANCELING", CANCELED} else state


def _newest(details: list[Any], step: str) -> Any:
    """What the server says of the step: the entry of its name, else that of its last attempt; None before it begins."""
    found = [detail for detail in details if without_attempt(str(detail.display_name)) == step]
    exact = [detail for detail in found if detail.display_name == step]
    return exact[-1] if exact else max(found, key=lambda detail: attempt_of(detail.display_name), default=None)


def _took(detail: Any) -> str:
    begin, end = detail.start_time or detail.create_time, detail.end_time
    if not (isinstance(begin, datetime) and isinstance(end, datetime)) or end < begin:
        return ""
    return f" in {(end - begin).total_seconds():.0f} s"


def _messages(nodes: Mapping[str, Mapping[str, Any]], steps: tuple[str, ...], phases: set[str]) -> list[str]:
    """`step: message` of each of Argo's nodes of pods in one of the phases that has one. The nodes around them say only
    that a child failed, so they count where no pod has a message."""
    found: dict[str, None] = {}
    for pod in (True, False):
        for node in nodes.values():
            message = str(node.get("message") or "").removeprefix(f"{MAIN}: ")
            if node.get("phase") in phases and message and (node.get("type") == "Pod") == pod:
                found[f"{_step_of(node, nodes, steps)}: {message}"] = None
        if found:
            break
    return list(found)


def _step_of(node: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]], steps: tuple[str, ...]) -> str:
    """The step that a node belongs to: its pod is called `executor`, the nodes around it have the step's name."""
    own = without_attempt(str(node.get("displayName") or node.get("name")))
    inner: Mapping[str, Any] | None = node
    while inner is not None:
        name = without_attempt(str(inner.get("displayName")))
        if name in steps:
            return name
        inner = nodes.get(str(inner.get("boundaryID")))
    return own
