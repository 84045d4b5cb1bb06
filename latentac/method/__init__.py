"""The mathematics of the method: pure functions on float32 tensors, each with its equation."""
