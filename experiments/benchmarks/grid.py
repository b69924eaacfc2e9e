"""Grid worlds stepped by actions drawn beforehand: how fast the environment alone is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experiments.benchmarks.measure import Result, Rounds, seconds
from learned_rl.registry import make_family

FAMILIES = {"grid/small": "tabular", "grid/all": "tabular", "grid/small-planes": "planes"}


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    tasks: int = 64
    """P: different grids"""
    copies: int = 64
    """B: copies of each"""
    steps: int = 500
    """calls of `step` in each round"""
    repeats: int = 7
    """rounds"""
    device: str = "cpu"


DEFAULT = Settings()


def stepping(family: str, s: Settings) -> Callable[[], None]:
    """A function that steps all copies `s.steps` times."""
    generator = torch.Generator().manual_seed(0)
    made = make_family(family)
    env = made.make(made.sample(s.tasks, generator), s.copies, 0, s.device)
    env.reset(seed=0)
    n = int(made.action_space.n)  # type: ignore[attr-defined]
    actions = torch.randint(n, (s.steps, s.tasks * s.copies), generator=generator).to(s.device)

    def run() -> None:
        for action in actions:
            env.step(action)

    return run


def measure(s: Settings = DEFAULT) -> list[Result]:
    """Environment steps per second of each family, summed over copies."""
    results = []
    for family, kind in FAMILIES.items():
        run = stepping(family, s)
        run()
        rounds = Rounds({family: lambda run=run: seconds(run, s.device)}, s.repeats)  # type: ignore[misc]
        N = s.tasks * s.copies
        rate, target = s.steps * N / rounds.median(family), ">= 2,000,000 env steps/s"
        name = f"{family}, {kind} observations, {N} copies"
        results.append(Result("grid", name, rate, "env steps/s", target=target, note=rounds.spread(family)))
    return results
