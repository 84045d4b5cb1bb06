"""latentac: actor-critic reinforcement learning for diffusion models in latent space.

The public names are in `__init__.pyi`. A name is imported when it is first used, so `import latentac` costs no torch.
Start reading at `latentac.runs.steps`: every step of the command line is a function there.
"""

import os

import lazy_loader

# diffusers imports onnxruntime, where it is installed, when it saves a pipeline. It would send events to Microsoft.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
