"""Measurements behind docs/benchmarks.md. `python -m bench` runs them all; each is also a program of its own."""
