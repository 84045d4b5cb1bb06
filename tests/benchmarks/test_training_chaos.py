"""Training jobs under faults: real agents, workers, and a real store."""

import json
from pathlib import Path

import pytest

from benchmarks import training_chaos
from benchmarks.plan import FULL


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(1500)
def test_faults_lose_at_most_one_iteration_and_change_no_result(
    minio_binary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four faults, in jobs of a fixed and of a changing number of workers. The time depends on the machine's load, so
    it is reported, and not judged here."""
    monkeypatch.delenv("LATENTAC_CLUSTER", raising=False)
    for name in ("LATENTAC_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # the program sets them: the test's own come back afterwards
    monkeypatch.setattr(training_chaos, "RECOVERY_SECONDS", 300.0)
    output = tmp_path / "training.json"
    code = training_chaos.main(["--faults", "4", "--seed", "3", "--iterations", "12", "--output", str(output)])
    said = capsys.readouterr().out
    assert code == 0, said
    found = json.loads(output.read_text())
    assert found["faults"] == 4 == sum(row["faults"] for row in found["kinds"].values())
    assert found["most_lost"] <= 1
    assert found["wrong_results"] == found["helped"] == 0
    assert {tuple(each["agents"]) for each in found["rounds"]} == {(2, 2), (2, 4)}
    assert all(each["largest_difference"] == 0 for each in found["rounds"] if each["agents"] == [2, 2])
    assert all(kind in said for kind in found["kinds"])


def test_a_result_belongs_to_a_commit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file among the results is not written from a tree with changes."""
    monkeypatch.setattr("benchmarks.plan.commit", lambda: "0123456789-dirty")
    with pytest.raises(SystemExit):
        training_chaos.main(["--output", str(FULL.results / "chaos" / "training.json")])
    assert "Commit the changes" in capsys.readouterr().err
