"""Rewards: functions of image and prompt that are to be maximised. One file per reward, one row in REWARDS."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from latentac.config.extensions import Table

REWARDS = Table(
    "reward",
    {
        "shapes_verifier": "latentac.rewards.shapes_verifier:ShapesVerifier",
        "jpeg_compressibility": "latentac.rewards.jpeg_compressibility:JpegCompressibility",
        "jpeg_incompressibility": "latentac.rewards.jpeg_incompressibility:JpegIncompressibility",
        "shapes_clip": "latentac.rewards.shapes_clip:ShapesClip",
        "colourfulness": "latentac.rewards.colourfulness:Colourfulness",
        "ink_share": "latentac.rewards.ink_share:InkShare",
        "clip_score": "latentac.rewards.clip_score:ClipScore",
        "pickscore": "latentac.rewards.pickscore:PickScore",
        "aesthetic": "latentac.rewards.aesthetic:Aesthetic",
        "hpsv2": "latentac.rewards.hpsv2:Hpsv2",
        "vqa": "latentac.rewards.vqa:Vqa",
        "geneval": "latentac.rewards.geneval:Geneval",
        "image_reward": "latentac.rewards.image_reward:ImageReward",
        "nsfw": "latentac.rewards.nsfw:Nsfw",
        "ocr": "latentac.rewards.ocr:Ocr",
        "judge": "latentac.rewards.judge:Judge",
        "remote": "latentac.rewards.remote:Remote",
    },
)


class Reward(Protocol):
    """Built as `Class(settings)`, or `Class()` without `Settings`. The configuration gives it its name.

    Optional members:

    unit: str, what one unit of the number means.
    transient_errors: exception types and HTTP statuses after which another attempt may help.
    outside: bool, whether it only waits for something outside its process. Rollouts then go on while it scores.
    fetch(): has on this machine whatever it needs from elsewhere. `prepare` calls it once, without a time limit.
    checkpoints(): the folders and files that it reads, which its settings name (`latentac.rewards.folders.Checkpoint`).
        `latentac mirror` copies them.
    elsewhere: bool, whether `fetch` would have to download something. A dry run then calls neither it nor the reward.
    known(): (images, prompts, answers): images whose rewards are certain, by which `prepare` finds a broken
        installation.
    """

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> Any:
        """One finite number per image, higher is better, as an array, tensor or list of shape [B] or [B, 1].

        images: uint8 [B, H, W, 3], read-only; prompts: B texts. Each number depends on its own image and prompt only.
        A third parameter `metadata` receives B mappings: what the prompt file says beside each text.

        Calls come from several threads at once, each call from a thread of its own, in every process of a step: in
        training, one process per worker. State that calls share needs a lock.
        """
        ...


class WithMetadata(Protocol):
    """The same, with what the prompt file says of each prompt."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any: ...
