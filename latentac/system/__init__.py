"""What a process needs of its machine: files, terminals, signals, progress, errors. No torch."""
