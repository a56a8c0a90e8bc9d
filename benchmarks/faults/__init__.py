"""Whatever can happen to a run, done to a real one: see `python -m benchmarks.faults --help`."""
