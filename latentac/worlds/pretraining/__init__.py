"""How the pipelines of the embedded worlds are trained: autoencoder first, then denoiser and text encoders together."""
