"""Experiments with known outcomes in one lifetime; each file is one, and `python -m` runs it."""
