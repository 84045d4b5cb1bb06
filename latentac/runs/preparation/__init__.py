"""What is checked, fetched and estimated before a run begins."""
