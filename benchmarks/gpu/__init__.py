"""Models of real size on one GPU, beside the field's plain training loop: `make bench-gpu`.

    python -m benchmarks.gpu [--models sd15 sd35m] [--seconds 450] [--dry-run] [--set path=value]

The weights are random, in the true folder layouts, and written by the script. Everything runs in one process: what is
compared takes turns. Without a GPU the same script walks through miniatures of the same layouts.
"""
