"""The world of shapes: a procedural, captioned image set, a verifier, and how the pipelines were pretrained on it."""
