"""Workers on one study: trials per minute of two processes over those of one, on the same points in one journal."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import optuna

from experiments.benchmarks.measure import Result, processes
from experiments.tuning.agents import AgentStudy
from experiments.tuning.samplers import SearchConfig
from experiments.tuning.study import Search

TARGET = ">= 1.7"


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    env: str = "CartPole-v1"
    trials: int = 16
    steps: int = 16_384
    seeds: int = 8


DEFAULT = Settings()


def _search(s: Settings, journal: str) -> Search:
    study = AgentStudy.of("ppo", s.env, s.steps, seeds=s.seeds).study(s.env, test=False)
    return Search(study, journal, "workers", SearchConfig(trials=s.trials, pruner="none"))


def enqueue(s: Settings, journal: str) -> None:
    """Make the study, and note which points it is to try: the same in every study, whatever the order."""
    search = _search(s, journal)
    fixed = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(s.trials - 1):  # the defaults are the first trial
        search.enqueue(search.study.sample(fixed.ask()), "benchmark")


def work(s: Settings, journal: str) -> tuple[float, float]:
    """Be one worker; returns when its part of the study began and ended, in seconds of the machine's clock."""
    search = _search(s, journal)
    begin = time.monotonic()
    search.run()
    return begin, time.monotonic()


def per_minute(s: Settings, workers: int) -> float:
    """Trials per minute of a study with that many processes, from the first trial's begin to the last one's end."""
    with tempfile.TemporaryDirectory() as folder, processes(workers) as pool:
        journal = str(Path(folder) / "study.log")
        pool.submit(enqueue, s, journal).result()
        spans = [job.result() for job in [pool.submit(work, s, journal) for _ in range(workers)]]
    return 60 * s.trials / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def measure(s: Settings = DEFAULT) -> list[Result]:
    """One row for each number of workers."""
    one, two = per_minute(s, 1), per_minute(s, 2)
    note = f"{s.trials} trials of PPO on {s.env}, {s.seeds} x {s.steps} environment steps each, one thread a process"
    return [
        Result("tuning", "one process", one, "trials/min", note=note),
        Result("tuning", "two processes, one journal", two, "trials/min", "one process", two / one, TARGET, note),
    ]
