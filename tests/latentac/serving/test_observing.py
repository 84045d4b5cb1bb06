"""What an operator is told of a request."""

import json
import logging

import pytest

from latentac.serving.observing import Record, log_requests
from latentac.serving.request import Request

REQUEST = Request(prompt="a secret circle", seed=3)


def line(record: Record, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """What is logged at the end of a request."""
    log_requests()
    record.asked([REQUEST])
    record.answered(200)
    logging.getLogger("latentac.requests").handlers.clear()
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_prompt_is_logged_only_where_that_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    """The rest of the request always is, in one line of JSON."""
    output = line(Record("v1", "some-id", prompts=False), capsys)
    assert (output["request"], output["protocol"], output["status"]) == ("some-id", "v1", 200)
    assert isinstance(output["asked"], list)
    assert output["asked"][0]["seed"] == 3
    assert "secret" not in json.dumps(output)
    assert "a secret circle" in json.dumps(line(Record("v1", "some-id", prompts=True), capsys))
