"""How images are made: the policy, its kernels, and the only denoising loop."""
