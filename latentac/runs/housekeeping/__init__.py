"""The runs of an output folder and a store: listed, deleted, pruned."""
