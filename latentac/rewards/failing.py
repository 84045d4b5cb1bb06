"""How the failure of a reward is told: what was being done, and what helps."""

from collections.abc import Sequence

from latentac.system.errors import RewardError
from latentac.worlds.prompts import Prompt

REMEDY = "Correct the reward, or take it out of `rewards`. What the run has done so far is kept"


class Left(Exception):
    """A reward raised what is not for it to raise, such as SystemExit."""


class Own(Exception):
    """A RewardError that the reward's own class raised."""

    def __init__(self, error: RewardError) -> None:
        self.error = error
        super().__init__(str(error))


def place(prompts: Sequence[Prompt]) -> str:
    """Which images, for messages."""
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return f"prompt {prompts[0].text!r}{more}"
