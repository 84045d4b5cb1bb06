"""A run from its configuration to a released model. Start reading at `latentac.runs.steps`."""
