"""The command `latentac convert-weights`: published pickles as safetensors, which is all that rewards read."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


def add_convert_weights(
    make: Callable[..., argparse.ArgumentParser], add: Callable[..., argparse.ArgumentParser]
) -> None:
    """make: gives a parser its help, as `latentac.runs.cli` does for all commands; add: makes one of a name."""
    command = make(
        add,
        "convert-weights",
        "convert a published pickle of a reward to safetensors, in a process without a network",
        "latentac convert-weights --kind hpsv2 --from HPS_v2.1_compressed.pt --to hpsv2 --like CLIP-ViT-H-14\n"
        "  latentac convert-weights --kind aesthetic --from sac+logos+ava1-l14-linearMSE.pth --to head.safetensors",
    )
    text = (
        "hpsv2 (HPS_v2.1_compressed.pt), image_reward (ImageReward.pt), or aesthetic (sac+logos+ava1-l14-linearMSE.pth)"
    )
    command.add_argument("--kind", required=True, metavar="KIND", help=text)
    command.add_argument("--from", required=True, type=Path, metavar="FILE", dest="file", help="the published pickle")
    text = "new folder, or for aesthetic a new file; nothing is overwritten"
    command.add_argument("--to", required=True, type=Path, metavar="FOLDER", help=text)
    text = (
        "folder of the model that it was trained from, whose weights are not needed: for hpsv2 "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, for image_reward google-bert/bert-base-uncased"
    )
    command.add_argument("--like", type=Path, metavar="FOLDER", help=text)
    command.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> None:
    from latentac.rewards.conversion import convert

    answer = convert(options.kind, options.file, options.to, options.like)
    sys.stdout.write(json.dumps(answer) + "\n")
