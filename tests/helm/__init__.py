"""The chart as Helm renders it; what it does on a cluster is in tests/cluster."""
