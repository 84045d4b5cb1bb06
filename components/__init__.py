"""The pipeline's steps: one folder per step, each a thin KFP component over one function of `latentac.runs.steps`."""

import os
from importlib.metadata import version

_DEFAULT = f"ghcr.io/latentac/{{}}:{version('latentac')}"

PIPELINE = os.environ.get("LATENTAC_IMAGE_PIPELINE") or _DEFAULT.format("pipeline")
TRAIN = os.environ.get("LATENTAC_IMAGE_TRAIN") or _DEFAULT.format("train")
SERVE = os.environ.get("LATENTAC_IMAGE_SERVE") or _DEFAULT.format("serve")
"""Image references, read when the pipeline is compiled. Embedded runs use none."""
