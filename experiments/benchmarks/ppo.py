"""PPO's speed on CartPole against Stable-Baselines3 and a CleanRL-style loop, ten seeds at once, and what DPO costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.benchmarks.contenders import PPOSettings
from experiments.benchmarks.measure import Result, seconds

ENV, BUILT_IN = "CartPole-v1", "control/cartpole-default"
UNIT = "env steps/s"


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    ppo: PPOSettings = PPOSettings()
    warm_up: int = 2
    """updates of each fresh agent that are not measured"""
    updates: int = 25
    """updates that are, in each round"""
    seeds: int = 10
    """agents of the run with many seeds"""
    update_calls: int = 50
    """updates in each round of the comparison without environment"""
    repeats: int = 5


DEFAULT = Settings()


def measure(s: Settings = DEFAULT) -> list[Result]:
    """All rows: speed, many seeds, cost of DPO."""
    return [*_speed(s), *_dpo(s)]


def _learning(s: Settings, make: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of training by a fresh agent, after its warm-up."""

    def run() -> float:
        agent = make()
        extra = {"reset_num_timesteps": False} if hasattr(agent, "rollout_buffer") else {}  # Stable-Baselines3 goes on
        agent.learn(s.warm_up * s.ppo.per_update, **extra)
        return seconds(lambda: agent.learn(s.updates * s.ppo.per_update, **extra))

    return run
