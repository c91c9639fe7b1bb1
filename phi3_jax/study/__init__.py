"""A study as a table of runs: planned, trained, reported."""
