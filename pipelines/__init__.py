"""The graph of the steps (`pipeline`), its compiled form, and the ways to run it."""
