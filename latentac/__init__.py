"""latentac: actor-critic reinforcement learning for diffusion models in latent space.

Start reading at `latentac.runs.verbs`: every verb of the command line is a function there.
"""

__version__ = "0.1.0"
