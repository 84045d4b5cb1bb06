"""Whether a model that answers questions sees the prompt in the image: VQAScore (Lin et al., arXiv 2404.01291)."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from latentac.rewards.learned import LearnedReward, LearnedSettings
from latentac.system.errors import ConfigError, Problem, describe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentac.rewards.vlm_folder import Vlm


class Vqa(LearnedReward):
    """The probability of `answer` as the first token that the model generates, over its whole vocabulary, after the
    question whether the image shows the prompt. Special tokens in a prompt are replaced by a space."""

    class Settings(LearnedSettings):
        source: str = "llava-hf/llava-1.5-7b-hf"
        """A folder with a model for image-text-to-text of transformers and its processor, or a hub id. Families whose
        processor needs torchvision (Qwen2-VL, SmolVLM) cannot be loaded."""
        question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
        """What is asked, as published. `{prompt}` is the prompt."""
        conversation: str = "USER: <image>\n{question} ASSISTANT:"
        """What stands around the question, with the mark of the image as the model was trained on it. This is the one
        of LLaVA 1.5. Chat templates of a folder are not used: they are programs."""
        answer: Annotated[str, Field(min_length=1)] = "Yes"
        """The word whose first token counts."""
        batch_size: Annotated[int, Field(gt=0, le=4096)] = 4
        """Images that are scored together. It is halved when memory runs out. It changes a reward only by rounding."""
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """Of the network; the probability is computed in float32. `auto` is bfloat16 on a GPU that supports it, as
        published, else float32. `float16` is float32 on a CPU."""

    def __init__(self, settings: "Vqa.Settings") -> None:
        super().__init__(settings)
        for name, text, mark in (
            ("question", settings.question, "{prompt}"),
            ("conversation", settings.conversation, "{question}"),
        ):
            if text.count(mark) != 1:
                remedy = f"Write {mark} where it belongs, once"
                raise ConfigError([Problem(name, text, f"has {mark} {text.count(mark)} times", remedy)])
        self._question, self._conversation, self._answer = settings.question, settings.conversation, settings.answer
        self.unit = f"probability that the answer is {settings.answer}, by {settings.source}"

    def locate(self) -> Path:
        from latentac.rewards.vlm_folder import locate

        return locate(self._settings.source, self._settings.revision)

    def used(self, names: Collection[str]) -> set[str]:
        from latentac.rewards.vlm_folder import files

        return files(names)

    def read(self, folder: Path, dtype: "torch.dtype") -> "Vlm":
        from latentac.rewards.vlm_folder import Vlm

        return Vlm(self._settings.source, folder, dtype)

    def examine(self, folder: Path) -> None:
        """Ask about a small image: what a processor does not take is found here."""
        from latentac.rewards.vlm_folder import first_token, inputs, processor

        maker = processor(folder)
        try:
            inputs(maker, np.zeros((1, 32, 32, 3), np.uint8), [self._asked(maker, "a")])
        except Exception as error:
            problem = f"the model's processor does not take it ({describe(error, 300)})"
            remedy = "Write it with the mark for an image that the model was trained on"
            raise ConfigError([Problem("conversation", self._conversation, problem, remedy)]) from error
        if first_token(maker, self._answer) is None:
            problem = "is no word of the model's vocabulary"
            raise ConfigError([Problem("answer", self._answer, problem, "Use Yes or yes")])

    def score(self, network: "Vlm", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        from latentac.rewards.vlm_folder import first_token

        with self._turns:
            asked = network.ask(images, [self._asked(network.processor, prompt) for prompt in prompts])
            answer = first_token(network.processor, self._answer)
        assert answer is not None  # noqa: S101 - `examine` has seen to it
        return network.probabilities(asked, answer)

    def _asked(self, maker: Any, prompt: str) -> str:
        from latentac.rewards.vlm_folder import without_marks

        question = self._question.replace("{prompt}", without_marks(maker, prompt))
        return self._conversation.replace("{question}", question)
