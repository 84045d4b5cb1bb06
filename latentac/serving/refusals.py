"""The answer to a request that gets no image: its status, the reason in words, and each problem by its field."""

from collections.abc import Mapping, Sequence

from fastapi.responses import JSONResponse

from latentac.serving.request import MOST_PROBLEMS, shortened
from latentac.system.errors import Problem


class Refused(Exception):
    """A request that is wrong before its fields are read."""

    def __init__(self, status: int, problem: Problem) -> None:
        super().__init__(problem.problem)
        self.status, self.problem = status, problem


def unknown(what: str, name: str, known: str) -> Refused:
    """For a model or a version that is not the one that is served."""
    return Refused(404, Problem(what, shortened(name), "is not served here", f"Use {known}."))


def is_openai(path: str) -> bool:
    """Below /v1/, KServe's clients ask for models alone; OpenAI's ask for the rest."""
    return path.startswith("/v1/") and not path.startswith("/v1/models")


def refusal(
    status: int, problems: Sequence[Problem], headers: Mapping[str, str] | None = None, *, openai: bool = False
) -> JSONResponse:
    """openai: `error` is an object, as OpenAI's clients expect; KServe's expect text."""
    details = [
        {"field": p.path, "value": p.value, "problem": p.problem, "remedy": p.remedy} for p in problems[:MOST_PROBLEMS]
    ]
    words = "\n".join(map(str, problems[:MOST_PROBLEMS]))
    kind = "invalid_request_error" if status < 429 else "server_error"
    envelope = {"message": words, "type": kind, "param": problems[0].path, "code": None} if openai else words
    return JSONResponse({"error": envelope, "problems": details}, status, headers)
