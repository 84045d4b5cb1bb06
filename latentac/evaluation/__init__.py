"""How good a model is: held-out prompts, measures with intervals, and the steering benchmark."""
