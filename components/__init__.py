"""The pipeline's steps: one folder a step, each a thin KFP component over one verb of `latentac.run`."""

import os

IMAGE = os.environ.get("LATENTAC_IMAGE", "ghcr.io/latentac/train:0.1.0")
"""The image that every step runs in on a cluster; read when the pipeline is compiled. Embedded runs use none."""
