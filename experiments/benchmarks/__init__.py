from pathlib import Path

DEFAULT_OUT = Path("experiments/results/bench.json")
