"""Benchmarks: `python -m benchmarks`. Every result is checked before it is timed, and contenders take turns."""
