"""What `latentac runs` says of runs in every state, and what `delete` and `prune` take and leave."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from latentac.runs.cli import main
from latentac.runs.housekeeping import clearing
from latentac.runs.housekeeping import listing as runs
from latentac.runs.housekeeping.clearing import plan_delete, plan_prune, remove
from latentac.runs.housekeeping.listing import Run, list_runs
from latentac.runs.housekeeping.table import size, table
from latentac.runs.steps import FUNCTIONS
from latentac.store import Manifest, Store, open_store
from latentac.system.errors import ConfigError, IntegrityError, ResourceError, StoreError
from latentac.system.lifetime import run_lock
from tests.latentac.test_store import use, write

BEFORE_GATE = ("prepare", "pretrain-value", "train", "evaluate", "steer")
WEIGHTS = b"the same weights in every artifact" * 1000


class Place:
    """An output folder and a store with runs in them, made of small files by the store itself."""

    def __init__(self, output: Path, url: str) -> None:
        self.output, self.url, self.store = output, url, open_store(url or f"file://{output}/store")

    def run(
        self, name: str, steps: Sequence[str] = tuple(FUNCTIONS), decision: str = "promote", against: str | None = None
    ) -> str:
        """A run that has published these steps; the version of its model."""
        (self.output / name).mkdir(parents=True)
        request = {
            "recipe": "shapes-unet",
            "overrides": ["seed=3"],
            "store": self.url,
            "config": "",
            "way": "processes",
        }
        (self.output / name / "request.json").write_text(json.dumps(request))
        (self.output / name / "run.lock").write_text("1")
        version, parents = f"{name}-0123abcd", list[Manifest]()
        difference = {"shapes_verifier": {"mean": 0.25, "low": 0.125, "high": 0.5}}
        files: dict[str, dict[str, Any]] = {
            "prepare": {"config.json": {"recipe": "shapes-unet", "seed": 3, "gate": {"reward": "shapes_verifier"}}},
            "evaluate": {"evaluation.json": {"difference": difference, "production": {"version": against}}},
        }
        metrics = {"gate": {"decision": decision}, "deploy": {"version": version}}
        for step in steps:
            folder = self.output / name / f".{step}-made"
            content = {path: json.dumps(value).encode() for path, value in files.get(step, {}).items()}
            write(folder, content | {"step.txt": f"{name} {step}".encode(), "weights": WEIGHTS})
            made = self.store.publish(
                f"{name}/{step}", folder, run=name, step=step, config_hash="c", parents=parents,
                metrics=metrics.get(step, {}), owned=True,
            )  # fmt: skip
            parents = [made]
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink()
            folder.rmdir()
        if "prepare" in steps:
            self.store.fetch(f"{name}/prepare", self.output / name / "prepare", cache=self.output)
        if "train" in steps:
            self.checkpoint(name, 2)
            self.store.write_files(
                write(self.output / name / "tensorboard", {"events.out.tfevents.1": b"e"}), f"tensorboard/{name}"
            )
        if "deploy" in steps:
            self.model(name, version)
        return version

    def model(self, name: str, version: str, *steps: str) -> None:
        folder = write(self.output / "made", {"weights": WEIGHTS, "latentac.json": version.encode()})
        parents = [self.store.manifest(f"{name}/{step}") for step in ("train", *steps)]
        self.store.publish(f"models/{version}", folder, run=name, step="deploy", config_hash="c", parents=parents)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    def checkpoint(self, name: str, iteration: int) -> None:
        folder = write(self.output / "made", {"state": f"{name} {iteration}".encode() * 500})
        key = f"checkpoints/{name}/{iteration:06d}"
        self.store.publish(key, folder, run=name, step="train", config_hash="c")
        self.store.write_json(f"checkpoints/{name}/LATEST", {"key": key})
        (folder / "state").unlink()
        folder.rmdir()

    def fail(self, name: str, step: str) -> None:
        (self.output / name / "error.json").write_text(json.dumps({"task": step, "exit_code": 5, "message": "no"}))

    def listed(self) -> dict[str, Run]:
        return {run.name: run for run in list_runs(self.output, self.url)}

    def objects(self, of: str = "") -> list[str]:
        return sorted(name for name in self.store.entries() if of in name)


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.minio)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    url = "" if request.param == "file" else use(request.getfixturevalue("minio_server"), monkeypatch)
    return Place(tmp_path / "runs", url)


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return Place(tmp_path / "runs", "")


def clear(plan: clearing.Plan) -> list[str]:
    return [removal.title for removal in remove(plan)]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> float:
    """Two days on: what the system writes down itself, when a file got a name, cannot be set back."""
    now = time.time() + 2 * 86400
    monkeypatch.setattr(time, "time", lambda: now)
    return now


# The list


def test_each_state_is_reported(place: Place) -> None:
    """From what is published, what is locked, and the message that a failed step left."""
    place.run("done")
    place.run("held", [*BEFORE_GATE, "gate", "finish"], decision="hold")
    place.run("failed", ["prepare", "pretrain-value"])
    place.fail("failed", "train")
    place.run("failed-once", ["prepare", "pretrain-value"])
    place.fail("failed-once", "prepare")
    os.utime(place.output / "failed-once" / "error.json", (1, 1))  # before it was published after all
    place.run("stopped", BEFORE_GATE)
    place.run("asked", [])
    place.run("away", ["prepare"])
    for path in (place.output / "away" / "prepare").iterdir():
        path.unlink()
    (place.output / "away" / "prepare").rmdir()
    for name in ("request.json", "run.lock"):
        (place.output / "away" / name).unlink()
    place.run("cluster", ["prepare", "pretrain-value"])
    place.store.write_json("failures/cluster.json", {"attempt": "1", "error": {"kind": "RewardError"}})
    with run_lock(place.output / "stopped" / "task.lock"):
        states = {name: (run.state, run.step) for name, run in place.listed().items()}

    assert states == {
        "done": ("done", ""),
        "held": ("held", ""),
        "failed": ("failed", "train"),
        "failed-once": ("stopped", "train"),
        "stopped": ("running", "gate"),
        "asked": ("stopped", "prepare"),
        "away": ("elsewhere", "pretrain-value"),
        "cluster": ("failed", "train"),
    }
    assert place.listed()["stopped"].state == "stopped"


def test_recipe_seed_gain_and_gate_are_reported(place: Place) -> None:
    """The gain is the gate's reward, with its interval; recipe and seed are there before anything is published."""
    place.run("held", [*BEFORE_GATE, "gate"], decision="hold")
    place.run("asked", [])
    held, asked = place.listed()["held"], place.listed()["asked"]
    assert (held.recipe, held.seed, held.gate) == ("shapes-unet", 3, "hold")
    assert (held.gain, held.gain_low, held.gain_high) == (0.25, 0.125, 0.5)
    assert (asked.recipe, asked.seed, asked.gate, asked.gain) == ("shapes-unet", 3, "", None)


def test_the_size_counts_each_file_once(here: Place) -> None:
    """However many artifacts and working copies share it."""
    here.run("one")
    assert len(WEIGHTS) < here.listed()["one"].bytes < len(WEIGHTS) + 30_000


def test_a_run_in_a_store_of_its_own_is_found_there(tmp_path: Path) -> None:
    """Runs of one output folder may have been started with other stores; one that cannot be reached hides no other."""
    own = Place(tmp_path / "runs", f"file://{tmp_path}/own")
    own.run("own")
    Place(tmp_path / "runs", "").run("usual")
    (tmp_path / "runs" / "lost").mkdir()
    request = {"recipe": "shapes-unet", "overrides": [], "store": "s3://bucket/unreachable"}
    (tmp_path / "runs" / "lost" / "request.json").write_text(json.dumps(request))
    found = {run.name: run.state for run in list_runs(tmp_path / "runs", "")}
    assert found == {"own": "done", "usual": "done", "lost": "stopped"}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "1", '"x"', "null", "[" * 100_000, '{"a":' * 100_000, '{"task": []}', '{"gate": 3, "evaluation": []}',
        '{"gate": {"reward": [1]}, "evaluation": {"difference": [1]}}', '{"recipe": [1], "store": 7, "overrides": 3}',
        '{"recipe": {"a": 1}, "store": "", "overrides": ["seed={a: 1}"]}', '{"seed": "\\ud800"}',
        '{"difference": {"r": {"mean": "x", "low": 1e999}}, "gate": {"reward": "r"}, "project": 5, "recipe": [2]}',
    ],
)  # fmt: skip
def test_files_of_a_run_that_say_nonsense_hide_no_run(here: Place, tmp_path: Path, content: str) -> None:
    """Of each kind, here and in the store: the run is listed all the same, and so is its neighbour."""
    odd = here.output / "odd"
    odd.mkdir(parents=True)
    for name in ("request.json", "summary.json", "error.json"):
        (odd / name).write_text(content)
    for step, name in (("prepare", "config.json"), ("evaluate", "evaluation.json")):
        folder = write(tmp_path / step, {name: content.encode()})
        here.store.publish(f"stored/{step}", folder, run="stored", step=step, config_hash="c")
    here.run("sound")
    found = list_runs(here.output, "")
    assert {run.name for run in found} == {"odd", "stored", "sound"}
    assert len(table(found).splitlines()) >= 8
    json.dumps([run.to_dict() for run in found])


def test_the_table_fits_a_terminal(here: Place) -> None:
    """80 columns, for the longest states, names and numbers too."""
    worst = Run(
        "a-recipe-with-a-name-as-long-as-people-like-20260131-120000-2", "failed", "pretrain-value",
        "a-project-with-a-name-that-people-like", "a-recipe-with-a-name-as-long-as-people-like",
        2**31 % 10**7, -12.345, -12.456, -12.234, "promote",
        123_456_789_012, "2026-01-31T12:00:00+00:00",
    )  # fmt: skip
    text = table([worst, Run("short", "done", "", "", "", None, None, None, None, "", 0, "")])
    assert max(map(len, text.splitlines())) <= 80
    assert "failed at pretrain-value" in text
    assert text.count("in project") == text.count("in project a-project-with-a-name-that-people-like") == 1
    assert [size(count) for count in (0, 999, 1000, 1_500_000, 2 * 10**13)] == [
        "0 B", "999 B", "1.0 kB", "1.5 MB", "20.0 TB",
    ]  # fmt: skip


def test_the_list_comes_without_torch_and_soon(here: Place) -> None:
    """A second of work at most, as text and as JSON; an empty folder is not an error."""
    here.run("one")
    script = (
        "import sys, time\nfrom latentac.runs.cli import main\nbegan = time.process_time()\n"
        f"assert main(['runs', '--output', {str(here.output)!r}]) == 0\n"
        "assert 'torch' not in sys.modules\nassert time.process_time() - began < 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "one" in done.stdout


def test_json_has_every_number(here: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What a program reads: the fields of the table, exactly."""
    here.run("one")
    assert main(["runs", "--json", "--output", str(here.output)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    fields = "run state step project recipe seed gain gain_low gain_high gate bytes started"
    assert list(found) == fields.split()
    assert main(["runs", "--output", str(here.output / "nowhere")]) == 0


# Deleting


def test_a_deleted_run_is_gone_and_the_others_are_whole(place: Place) -> None:
    """Artifacts, checkpoints, model, event files, failure and lease in the store, the working folder here; and the
    bytes that were promised become free."""
    place.run("goes")
    place.run("stays", BEFORE_GATE)
    place.store.write_json("failures/goes.json", {"error": None})
    place.store.write_json("leases/goes.json", {"attempt": "1", "token": "x"})
    plan = plan_delete(["goes"], place.output, place.url)
    before = occupied(place)

    assert clear(plan) == ["run goes"]
    assert place.objects("goes") == []
    assert not (place.output / "goes").exists()
    assert occupied(place) == before - plan.bytes
    for step in BEFORE_GATE:
        place.store.verify(place.store.manifest(f"stays/{step}"))
    assert list(place.listed()) == ["stays"]


def occupied(place: Place) -> int:
    """Bytes of all files on disk, or in the bucket and on disk."""
    found = {f"{status.st_dev}:{status.st_ino}": status.st_size for _, status in runs.files(place.output)}
    if place.url:
        found |= {name: entry.size for name, entry in place.store.entries().items()}
    return sum(found.values())


POINTERS = ["registry/production.json", "registry/mine/production.json", "registry/mine/candidate.json"]


@pytest.mark.parametrize("pointer", POINTERS)
@pytest.mark.parametrize("field", ["version", "previous"])
def test_what_a_project_points_at_stays(place: Place, pointer: str, field: str) -> None:
    """In production, to go back to, or a candidate, whichever project's: the run is named with the reason."""
    version = place.run("named")
    place.run("other")
    place.store.write_json(pointer, {"version": "x", "run": "gone", "previous": None, field: version})
    with pytest.raises(ConfigError, match=re.escape(pointer)):
        plan_delete(["other", "named"], place.output, place.url)
    plan = plan_prune(place.output, place.url, keep=0)
    assert list(plan.kept) == ["named"]
    assert "run other" in clear(plan)
    assert place.objects("other") == []
    place.store.verify(place.store.manifest(f"models/{version}"))


def test_a_pointer_that_cannot_be_read_keeps_everything(here: Place) -> None:
    """Nobody knows what it names."""
    here.run("one")
    (here.output / "store" / "registry").mkdir()
    (here.output / "store" / "registry" / "production.json").write_text("{")
    with pytest.raises(IntegrityError):
        plan_delete(["one"], here.output, "")
    with pytest.raises(IntegrityError):
        plan_prune(here.output, "", keep=0)


def test_the_parents_of_a_model_stay(here: Place) -> None:
    """Also where another run than the pointer's published them."""
    here.run("trained")
    folder = write(here.output.parent / "made", {"weights": b"w"})
    parents = [here.store.manifest("trained/train")]
    here.store.publish("models/other-01234567", folder, run="other", step="deploy", config_hash="c", parents=parents)
    here.store.write_json("registry/p/production.json", {"version": "other-01234567", "run": "other", "previous": None})
    assert "trained" in plan_prune(here.output, "", keep=0).kept


def test_a_model_that_another_run_was_compared_with_stays(place: Place) -> None:
    """Its files, that is: that run's gate may be asked again. It goes when that run has gone too."""
    version = place.run("older")
    place.run("newer", BEFORE_GATE, against=version)
    plan = plan_delete(["older"], place.output, place.url)
    assert plan.kept == {f"models/{version}": "newer was compared with it"}
    clear(plan)
    place.store.verify(place.store.manifest(f"models/{version}"), parents=False)
    assert {name.split("/")[0] for name in place.objects("older")} == {"models"}

    clear(plan_delete(["newer"], place.output, place.url))
    clear(plan_prune(place.output, place.url))
    assert place.objects("older") == []


def test_the_base_of_an_adapter_stays_with_it(place: Place) -> None:
    """An adapter of no base is no model: what `prepare` has published goes when the adapter goes."""
    version = place.run("older")
    place.model("older", version, "prepare")
    place.run("newer", BEFORE_GATE, against=version)
    clear(plan_delete(["older"], place.output, place.url))
    clear(plan_prune(place.output, place.url))
    for key in (f"models/{version}", "older/prepare"):
        place.store.verify(place.store.manifest(key), parents=False)
    assert {name.split("/")[1] for name in place.objects("older")} == {version, "prepare"}

    clear(plan_delete(["newer"], place.output, place.url))
    clear(plan_prune(place.output, place.url))
    assert place.objects("older") == []


@pytest.mark.parametrize("lock", runs.LOCKS)
def test_a_running_run_stays(here: Place, lock: str) -> None:
    """Whoever holds a lock on it, driver, step or training; also if it begins after the plan was made."""
    here.run("busy", BEFORE_GATE)
    with run_lock(here.output / "busy" / lock):
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
            plan_delete(["busy"], here.output, "")
        assert plan_prune(here.output, "", keep=0).removals == ()
    plan = plan_delete(["busy"], here.output, "")
    (here.output / "busy" / lock).touch()
    with run_lock(here.output / "busy" / lock), pytest.raises(ResourceError):
        clear(plan)
    assert "train" in place_steps(here, "busy")


def test_the_locks_of_a_run_go_last(here: Place) -> None:
    """While they are there, nobody else begins to work on what is being removed."""
    here.run("goes", BEFORE_GATE)
    for lock in runs.LOCKS:
        (here.output / "goes" / lock).touch()
    (removal,) = plan_delete(["goes"], here.output, "").removals
    names = [path.name for path in removal.paths]
    assert {*names[-len(runs.LOCKS) :]} == {*runs.LOCKS}
    assert "tensorboard" in names  # which would come after them


def place_steps(place: Place, run: str) -> list[str]:
    return [key.rpartition("/")[2] for key in place.store.keys(run)]


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "made anew"])
def test_whoever_waited_for_the_lock_of_a_deleted_run_learns_of_it(here: Place, again: bool) -> None:
    """It must not begin in a folder that is no more, nor in one that somebody has made anew and may hold."""
    here.run("goes", ["prepare"])
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from latentac.system.lifetime import run_lock\nprint('ready', flush=True)\n"
        "with run_lock(Path(sys.argv[1])):\n    print('began')\n"
    )
    lock = here.output / "goes" / "run.lock"
    with run_lock(lock):
        command = [sys.executable, "-c", script, str(lock)]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        time.sleep(1)
        lock.unlink()
        if again:
            lock.touch()
    out, error = waiting.communicate(timeout=30)
    assert "began" not in out
    assert "was deleted meanwhile" in error


def test_nothing_outside_the_output_is_touched(here: Place, tmp_path: Path) -> None:
    """Links are removed or left alone, never followed, wherever they are; files of somebody else's stay."""
    outside = write(tmp_path / "outside", {"precious": b"p", "deep/er": b"q"})
    here.run("goes")
    here.run("elsewhere", ["prepare"])
    (here.output / "goes" / "prepare" / "link").symlink_to(outside)
    (here.output / "goes" / "model").symlink_to(outside)
    (here.output / "goes" / "notes.txt").write_text("mine")
    (here.output / "store" / "goes" / "train" / "files-0123456789abcdef").symlink_to(outside)
    (here.output / "store" / "tensorboard" / "goes" / "more").symlink_to(outside)
    (here.output / "store" / "goes" / "own.txt").write_text("mine")
    (here.output / "elsewhere").rename(tmp_path / "moved")
    (here.output / "elsewhere").symlink_to(tmp_path / "moved")
    clear(plan_delete(["goes", "elsewhere"], here.output, ""))

    assert sorted(path.name for path in outside.rglob("*")) == ["deep", "er", "precious"]
    assert [path.name for path in (here.output / "goes").iterdir()] == ["notes.txt"]
    assert (tmp_path / "moved" / "request.json").is_file()
    assert (here.output / "store" / "goes" / "own.txt").is_file()


@pytest.mark.parametrize("where", [".", "store"])
@pytest.mark.parametrize("within", ["", "zz"])
def test_a_link_in_a_pool_of_shared_files_is_not_followed(here: Place, tmp_path: Path, where: str, within: str) -> None:
    """Whose link it is, nobody knows; what it leads to is not swept, and nothing is put there."""
    here.run("goes")
    here.run("stays")
    outside = write(tmp_path / "outside", {"precious": b"p", "ab/precious": b"q"})
    pool = here.output / where / ".objects"
    if within:
        pool.mkdir(exist_ok=True)
    elif pool.exists():
        pool.rename(pool.with_name("moved"))
    (pool / within if within else pool).symlink_to(outside)
    before = sorted(path.name for path in outside.rglob("*"))
    clear(plan_delete(["goes"], here.output, ""))
    clear(plan_prune(here.output, ""))
    here.run("later")
    assert sorted(path.name for path in outside.rglob("*")) == before


def test_a_link_in_the_place_of_unfinished_writes_is_not_followed(here: Place, tmp_path: Path, later: float) -> None:
    """However old the files are that it leads to."""
    here.run("stays")
    outside = write(tmp_path / "outside", {"precious": b"p"})
    partial = here.output / "store" / ".partial"
    partial.rmdir()
    partial.symlink_to(outside)
    clear(plan_prune(here.output, ""))
    assert (outside / "precious").is_file()
    with pytest.raises(StoreError, match="it is a link"):
        here.run("later")


def test_files_of_somebody_else_in_a_store_that_a_run_names_stay(here: Place, tmp_path: Path) -> None:
    """A run's folder may name any folder as its store; what is not named as steps name it is not removed there."""
    outside = write(tmp_path / "outside", {"tensorboard/goes/notes.md": b"p", "goes/train/notes": b"q"})
    folder = here.output / "goes"
    folder.mkdir(parents=True)
    request = {"recipe": "shapes-unet", "overrides": [], "store": f"file://{outside}"}
    (folder / "request.json").write_text(json.dumps(request))
    assert main(["delete", "goes", "--output", str(here.output), "--yes"]) == 0
    assert (outside / "tensorboard" / "goes" / "notes.md").is_file()
    assert (outside / "goes" / "train" / "notes").is_file()


def test_a_store_that_holds_nothing_of_a_run_is_not_listed(
    here: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder may name `/` as its store, and to list that takes minutes."""
    here.run("sound", ["prepare"])
    request = {"recipe": "shapes-unet", "overrides": [], "store": "file:///"}
    (here.output / "odd").mkdir()
    (here.output / "odd" / "request.json").write_text(json.dumps(request))
    listed = []
    monkeypatch.setattr(Store, "entries", lambda store: listed.append(store.url) or {})  # type: ignore[func-returns-value]
    assert "odd" in {run.name for run in list_runs(here.output, "")}
    assert listed == [f"file://{here.output}/store"]


@pytest.mark.parametrize("name", ["request.json", "error.json", "summary.json"])
def test_a_file_of_a_run_that_never_ends_hides_no_run(here: Place, name: str) -> None:
    """100 GB, none of them on the disk, and a pipe that nobody writes to."""
    for odd in ("large", "pipe"):
        (here.output / odd).mkdir(parents=True)
        (here.output / odd / "run.lock").touch()
    with (here.output / "large" / name).open("wb") as file:
        file.truncate(100 * 2**30)
    if name != "request.json":
        os.mkfifo(here.output / "pipe" / name)
    here.run("sound", ["prepare"])
    assert {run.name for run in list_runs(here.output, "")} == {"large", "pipe", "sound"}


def test_a_run_named_like_a_path_is_no_run(here: Place) -> None:
    """Nothing but the id of a run that is there is taken."""
    here.run("one")
    for name in ("../one", ".", "store", "one/prepare", "registry", ""):
        with pytest.raises(ConfigError, match="no such run"):
            plan_delete([name], here.output, "")


def test_a_delete_that_was_cut_off_anywhere_is_finished_by_the_next(place: Place) -> None:
    """After each single object: no artifact is whole in form without its files, and the same command does the rest."""
    place.run("goes", ["prepare", "train"])
    for cut in range(1, 30):
        try:
            plan = plan_delete(["goes"], place.output, place.url)
        except ConfigError:
            break
        names = plan.removals[0].objects
        place.store.remove(names[: 1 if cut < 5 else 4])
        for key in place.store.keys("goes"):
            place.store.verify(place.store.manifest(key), parents=False)
        if not place.objects("goes"):
            break
    clear(plan_delete(["goes"], place.output, place.url))
    assert place.objects("goes") == []
    assert not (place.output / "goes").exists()


@pytest.mark.slow
def test_a_delete_that_is_killed_is_finished_by_the_next(here: Place) -> None:
    """kill -9 at any moment, the same command again."""
    for turn in range(6):
        here.run("goes")
        command = [sys.executable, "-m", "latentac.runs.cli", "delete", "goes", "--yes", "--output", str(here.output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.002 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with contextlib.suppress(ConfigError):
            clear(plan_delete(["goes"], here.output, ""))
        clear(plan_prune(here.output, ""))
        assert here.objects() == []
        assert not (here.output / "goes").exists()


# Pruning


def test_prune_takes_the_runs_that_fit_every_condition(place: Place) -> None:
    """Not the newest N, older than a time, failed or stopped; without a condition no run at all."""
    for number, name in enumerate(["a", "b", "c", "d"]):
        place.run(name, [*BEFORE_GATE, "gate"], decision="hold" if name != "b" else "promote")
        when = time.time() - (4 - number) * 86400
        os.utime(place.output / name / "request.json", (when, when))
    place.fail("d", "finish")

    def going(**conditions: Any) -> list[str]:
        plan = plan_prune(place.output, place.url, **conditions)
        return [removal.title.removeprefix("run ") for removal in plan.removals if removal.title.startswith("run ")]

    assert going() == []
    assert going(keep=3) == ["a"]
    assert sorted(going(older_than=2.5 * 86400)) == ["a", "b"]
    assert sorted(going(failed=True)) == ["b", "d"]
    assert going(failed=True, keep=1) == ["b"]
    assert going(failed=True, older_than=5 * 86400) == []


def test_prune_clears_what_killed_processes_left(here: Place, later: float) -> None:
    """Unfinished writes, temporary folders, files that no manifest names, checkpoints of a training that has ended,
    a model of a run that is gone; nothing of a run that is running, and nothing that is named."""
    here.run("ended", [*BEFORE_GATE, "gate"], decision="hold")
    here.run("training", ["prepare", "pretrain-value"])
    here.checkpoint("training", 4)
    here.run("busy", BEFORE_GATE)
    here.model("ended", "gone-01234567")
    folder = here.output / "store" / "models" / "gone-01234567"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "run": "gone"}, indent=2, sort_keys=True) + "\n")
    write(here.output / "store", {".partial/abc": b"x", "ended/steer/files-0123456789abcdef/old": b"x" * 5000})
    write(here.output, {"ended/.latentac-train-killed/big": b"x" * 5000, "busy/.latentac-train-now/big": b"x"})
    write(here.output, {"ended/.latentac-report.html.7": b"x", ".latentac-compare.html.7": b"x", ".mine": b"x"})
    write(here.output, {"ended/latentac-abandoned/big": b"x", "latentac-of-mine/letter": b"x"})
    write(here.output, {f"{run}/checkpoints/000002/manifest.json": b"x" for run in ("ended", "training", "busy")})
    with run_lock(here.output / "busy" / "train.lock"):
        plan = plan_prune(here.output, "")
        titles = clear(plan)
        assert plan_prune(here.output, "").removals == ()

    assert sorted(titles) == [
        "ended: checkpoints of a training that has ended",
        "ended: files that no manifest names",
        "ended: temporary files of killed processes",
        "gone: what is left of a run that is gone",
        "temporary files of killed processes",
        "unfinished writes in the store",
    ]
    assert here.objects("checkpoints/ended") == []
    assert sorted(path.parts[-4] for path in here.output.glob("*/checkpoints/000002/manifest.json")) == [
        "busy",
        "training",
    ]
    assert len(here.objects("checkpoints/training")) == 3
    assert len(here.objects("checkpoints/busy")) == 3
    assert (here.output / "busy" / ".latentac-train-now" / "big").exists()
    assert not list(here.output.glob(".latentac-*"))
    assert (here.output / ".mine").exists()
    assert not list((here.output / "ended").glob("*latentac-*"))
    assert (here.output / "latentac-of-mine" / "letter").exists()
    for name in ("ended", "training", "busy"):
        for key in here.store.keys(name):
            here.store.verify(here.store.manifest(key))


def test_prune_leaves_what_is_being_written(here: Place) -> None:
    """Files that came in the last day may be of somebody who is at it, on this machine or another."""
    here.run("ended", BEFORE_GATE)
    (here.output / "store" / "checkpoints").rename(here.output.parent / "away")
    write(here.output / "store", {".partial/abc": b"x", "ended/gate/files-0123456789abcdef/new": b"x"})
    write(here.output, {"ended/.gate-now/big": b"x", "ended/.latentac-now/big": b"x", "ended/latentac-now/big": b"x"})
    write(here.output, {".latentac-compare.html.7": b"x"})
    old = time.time() - 10 * 86400
    for path in here.output.rglob("*new"):
        os.utime(path, (old, old))  # an old file that was linked there a moment ago
    assert plan_prune(here.output, "").removals == ()


def test_prune_of_a_bucket_leaves_nothing_of_a_run_that_is_gone(place: Place) -> None:
    """What a delete on another machine left: event files, checkpoints, a failure."""
    place.run("goes")
    for name in place.objects("goes"):
        if name.startswith("goes/"):
            place.store.remove([name])
    for path in sorted((place.output / "goes").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (place.output / "goes").rmdir()
    assert clear(plan_prune(place.output, place.url)) == ["goes: what is left of a run that is gone"]
    assert place.objects() == []


def test_what_may_run_on_another_machine_is_not_pruned(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no lock to look at; whoever names it is told. A finished run is another matter."""
    place.run("cluster", BEFORE_GATE)
    place.run("ended", [*BEFORE_GATE, "gate", "finish"], decision="hold")
    there = place.output.parent / "another machine"
    plan = plan_prune(there, place.store.url, keep=0)
    assert list(plan.kept) == ["cluster"]
    assert [removal.title for removal in plan.removals] == ["run ended"]
    assert main(["delete", "cluster", "--output", str(there), "--store", place.store.url]) == 0
    assert "does it run on another machine?" in capsys.readouterr().out


# Asking


def test_without_a_terminal_nothing_is_removed_by_default(here: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes and names first; --yes is the answer of a script."""
    here.run("one")
    before = here.objects()
    arguments = ["delete", "one", "--output", str(here.output)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"kB  run one\n.*kB  in all\nNothing was removed", shown)
    assert here.objects() == before
    assert main([*arguments, "--yes"]) == 0
    assert "removed  run one" in capsys.readouterr().out
    assert here.objects() == []
    assert main(arguments) == 2


@pytest.mark.parametrize(("answer", "gone"), [(b"n\n", False), (b"\n", False), (b"y\n", True)])
def test_a_person_is_asked(here: Place, answer: bytes, gone: bool) -> None:
    """On a real terminal; only yes is yes."""
    here.run("one", ["prepare"])
    command = [sys.executable, "-m", "latentac.runs.cli", "prune", "--keep", "0", "--output", str(here.output)]
    with terminal(command) as (process, controller):
        os.write(controller, answer)
        assert process.wait(60) == 0
    assert (here.output / "one").exists() != gone


@contextlib.contextmanager
def terminal(command: list[str]) -> Iterator["tuple[subprocess.Popen[bytes], int]"]:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    yield process, controller
    os.close(controller)


@pytest.mark.parametrize("bad", [["--older-than", "soon"], ["--keep", "-1"], ["--keep", "x"]])
def test_a_bad_condition_is_refused_before_anything(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With an example of a good one."""
    with pytest.raises(SystemExit) as stopped:
        main(["prune", *bad])
    assert stopped.value.code == 2
    assert "for example" in capsys.readouterr().err or bad[1] == "-1"


def test_a_store_can_be_read_by_its_url_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without the output folder: the runs of a bucket are listed and deleted."""
    place.run("one", ["prepare"])
    store: Store = place.store
    arguments = ["--output", str(place.output.parent / "none"), "--store", store.url]
    assert main(["runs", *arguments]) == 0
    assert "elsewhere at pretrain-value" in capsys.readouterr().out
    assert main(["delete", "one", "--yes", *arguments]) == 0
    assert place.objects() == []


def test_the_age_is_in_the_largest_whole_unit() -> None:
    """Since the run was started; a dash where nobody knows."""
    started = ["2026-01-31T12:00:00+00:00", "2026-02-02T09:00:00+00:00", "2026-02-02T11:56:00+00:00", ""]
    listed = [
        Run(str(place), "done", "", "", "", None, None, None, None, "", 0, each) for place, each in enumerate(started)
    ]
    text = table(listed, now=1770033600.0)  # 2026-02-02T12:00:00
    for run, age in zip(listed, ("2 d", "3 h", "4 min", "-"), strict=True):
        assert re.search(rf"^{run.name} .*\s{age}$", text, re.M), text
