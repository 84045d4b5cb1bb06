"""A vision language model as a reward: it is shown each image, and asked for a score by a rubric.

The server speaks OpenAI's protocol: `POST url/v1/chat/completions` with the rubric and the image as a data URL, at
temperature 0. One question is one image.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from latentac.config.sections import Number
from latentac.rewards.connection import ServerSettings, connect, png
from latentac.rewards.judgements import Judgements
from latentac.rewards.parallel import each_in_parallel
from latentac.system.errors import RewardError

CHAT = "/v1/chat/completions"
RUBRIC = (
    "This image was made for the prompt between the lines.\n---\n{prompt}\n---\n"
    "How well does it show what the prompt asks for? {lowest} is not at all, {highest} is completely and without flaw. "
    'Answer with a JSON object and nothing else: {"score": <number from {lowest} to {highest}>}'
)
_MOST_READ = 20_000
"""Characters of an answer in which a score is looked for."""
_MOST_SHOWN = 200
_FIELD = re.compile(r"\{(prompt|lowest|highest)\}")
_DECODER = json.JSONDecoder()


class Judge:
    """The score that a model behind OpenAI's protocol gives an image for its prompt, scaled to 0 to 1."""

    outside = True

    class Settings(ServerSettings):
        """Which model judges, by what, and how its answer is read. A failed request is repeated here, not by
        `retries`."""

        url: str
        """Address of the server, without `/v1/chat/completions`. It has no user and no password: see `token_file`."""
        model: Annotated[str, Field(min_length=1)]
        """Name of the model, as the server has it."""
        rubric: Annotated[str, Field(min_length=1, max_length=20_000)] = RUBRIC
        """What the model is asked. `{prompt}`, `{lowest}` and `{highest}` are replaced; other braces stay."""
        pattern: Annotated[str, Field(max_length=1000)] = ""
        """Regular expression of Python that finds the score: its first group, or all of it; the last match counts.
        Default: the last JSON object in the answer that has a number `score`."""
        lowest: Number = 0.0
        """The score that is worth 0."""
        highest: Number = 10.0
        """The score that is worth 1. A score outside of the two is no score."""
        max_tokens: Annotated[int, Field(gt=0, le=100_000)] = 256
        """Most tokens of an answer."""
        questions: Annotated[int, Field(gt=0, le=20)] = 3
        """How often to ask about an image until an answer has a score."""
        token_variable: str = ""
        """Environment variable with the token, where the steps run, in place of `token_file`."""
        judgements: str = ""
        """Folder in which scores are kept, by image, prompt, and these settings. Default: none are kept."""
        most_judgements: Annotated[int, Field(gt=0)] = 100_000
        """Scores in that folder. The oldest give way."""

        @field_validator("url")
        @classmethod
        def _without_version(cls, url: str) -> str:
            """OpenAI's clients call the address with `/v1` the base URL."""
            return url.removesuffix("/v1")

        @field_validator("pattern")
        @classmethod
        def _is_a_pattern(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except (re.error, RecursionError) as error:
                raise ValueError(f"is no regular expression: {error}") from None
            return pattern

        @model_validator(mode="after")
        def _fits(self) -> "Judge.Settings":
            if not self.lowest < self.highest:
                raise ValueError("lowest is not below highest")
            if self.token_file and self.token_variable:
                raise ValueError("token_file and token_variable are both set")
            return self

    def __init__(self, settings: "Judge.Settings") -> None:
        self._settings, self._service = settings, connect(settings, settings.token_variable)
        self._kept = Judgements(settings.judgements, settings.most_judgements) if settings.judgements else None
        self._asked = json.dumps(
            settings.model_dump(include={"url", "model", "rubric", "pattern", "lowest", "highest", "max_tokens"})
        )
        self.unit = f"score of {settings.model}, {settings.lowest:g} to {settings.highest:g}, scaled to 0 to 1"

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], 0 to 1, for `images` uint8 [B, H, W, 3]. Raises RewardError."""
        scores = np.zeros(len(prompts), np.float32)

        def work(place: int) -> None:
            key = self._key(images[place], prompts[place])
            known = self._kept.get(key) if self._kept else None
            scores[place] = self._judged(images[place], prompts[place]) if known is None else known
            if self._kept and known is None:
                self._kept.put(key, float(scores[place]))

        each_in_parallel(range(len(prompts)), work, self._settings.connections, "judge")
        return scores

    def _key(self, image: np.ndarray, prompt: str) -> str:
        """Of an image, a prompt, and every setting that has a part in the score."""
        content = hashlib.sha256(image.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([self._asked, image.shape, content, prompt]).encode()).hexdigest()

    def _judged(self, image: np.ndarray, prompt: str) -> float:
        own, answer = self._settings, ""
        question = self._question(image, prompt)
        for _ in range(own.questions):
            answer = self._text(self._service.ask(CHAT, question))
            score = score_in(answer, own.pattern)
            if score is not None and own.lowest <= score <= own.highest:
                return (score - own.lowest) / (own.highest - own.lowest)
        shown = repr(self._service.shown(answer)[:_MOST_SHOWN])
        problem = f"{own.model} gave no score from {own.lowest:g} to {own.highest:g} in {own.questions} answers"
        remedy = "Correct rubric or pattern; raise max_tokens if the answer was cut"
        raise RewardError(f"prompt {prompt!r}, {own.url}{CHAT}", f"{problem}; the last begins {shown}", remedy)

    def _question(self, image: np.ndarray, prompt: str) -> bytes:
        own = self._settings
        filled = {"prompt": prompt, "lowest": f"{own.lowest:g}", "highest": f"{own.highest:g}"}
        parts = [
            {"type": "text", "text": _FIELD.sub(lambda field: filled[field[1]], own.rubric)},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}},
        ]
        body = {
            "model": own.model,
            "temperature": 0,
            "max_tokens": own.max_tokens,
            "messages": [{"role": "user", "content": parts}],
        }
        return json.dumps(body).encode()

    def _text(self, answer: Any) -> str:
        """What the model says; "" where it says nothing. Raises RewardError for what is no answer of this protocol."""
        try:
            (choice,) = answer["choices"]
            content = choice["message"]["content"]
        except (LookupError, TypeError, ValueError):
            remedy = "Correct url: this server does not speak OpenAI's protocol"
            raise self._service.failed(CHAT, "answered without exactly one choice with a message", remedy) from None
        return content if isinstance(content, str) else ""


def score_in(answer: str, pattern: str = "") -> float | None:
    """The last score in what a model says, by `pattern` or as a JSON object; None where there is none."""
    answer, found = answer[:_MOST_READ], None
    if pattern:
        for match in re.finditer(pattern, answer):
            found = match[1] if match.re.groups else match[0]
        return _finite(found)
    place = answer.find("{")
    while place >= 0:
        try:
            value, end = _DECODER.raw_decode(answer, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            number = value.get("score")
            found = number if isinstance(number, int | float) and not isinstance(number, bool) else found
        place = answer.find("{", end)
    return _finite(found)


def _finite(found: Any) -> float | None:
    try:
        number = math.nan if found is None else float(found)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
