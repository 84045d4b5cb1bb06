"""What is reported of a run: metrics and trackers, the report, the model card, comparisons."""
