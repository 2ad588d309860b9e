"""Measurements: each module is one command, which prints a table and writes JSON to `benchmarks/results/`."""
