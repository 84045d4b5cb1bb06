"""What a process needs of its machine: files, terminals, signals, progress, and the errors that it raises. No torch."""
