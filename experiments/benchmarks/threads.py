"""One against two intra-op threads, on idle cores and beside one busy process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from experiments.benchmarks.contenders import PPOSettings, ours
from experiments.benchmarks.lpg import Settings as LPGSettings
from experiments.benchmarks.lpg import make_trainer
from experiments.benchmarks.measure import Result, busy_process, fresh, seconds

CARTPOLE = "PPO update with its rollout, CartPole-v1"


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    lpg: LPGSettings = field(default_factory=LPGSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    warm_up: int = 3
    repeats: int = 7
    """timed updates of each process"""


DEFAULT = Settings()


def _work(workload: str | int, s: Settings) -> Callable[[], object]:
    """One meta-step of LPG at that width, or one update of PPO."""
    if isinstance(workload, int):
        return make_trainer(s.lpg, workload)[0].step
    lifetimes = ours("CartPole-v1", s.ppo, 0).lifetimes
    inner = lifetimes.plain()
    return lambda: lifetimes.advance(inner)


def update_seconds(workload: str | int, s: Settings) -> float:
    """Median seconds of one update with this process's threads."""
    work = _work(workload, s)
    for _ in range(s.warm_up):
        work()
    return float(np.median([seconds(work) for _ in range(s.repeats)]))


def measure(s: Settings = DEFAULT) -> list[Result]:
    """Times with two threads over times with one, each in a process of its own."""
    workloads: list[str | int] = [*s.lpg.widths, CARTPOLE]
    results = []
    for load, beside in (("idle cores", nullcontext), ("beside a busy process", busy_process)):
        for workload in workloads:
            with beside():
                one, two = (fresh(n, update_seconds, workload, s) for n in (1, 2))
            what = f"LPG meta-step, width {workload}" if isinstance(workload, int) else workload
            note = f"one thread: {one:.4g} s"
            results.append(
                Result("threads", f"{what}, two threads, {load}", two, "s", "one thread", two / one, "", note)
            )
    return results
