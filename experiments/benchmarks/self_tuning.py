"""What learning online costs: self-tuned PPO and A2C beside the same algorithms, per environment step.

Both take the same environment steps in the same environment and learn from all of them; the self-tuned one also keeps
the graph of its update, trains an outer critic (gamma is among the tuned numbers, which makes it the default), judges
what came out, and moves the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.benchmarks.measure import Result, Rounds, seconds
from learned_rl import PPO, PPOConfig
from meta_optimizers.self_tuning import SelfTuning
from objectives.self_tuned import SelfTuned, SelfTunedConfig


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    env: str = "control/cartpole-default"
    """environment"""
    seeds: int = 10
    """P"""
    updates: int = 20
    """of each algorithm in a round"""
    rounds: int = 5
    """in which all take turns"""
    numbers: tuple[str, ...] = ("gamma", "gae_lambda", "ent_coef")
    """that are tuned"""
    configs: dict[str, PPOConfig] = field(default_factory=lambda: {"PPO": PPOConfig(), "A2C": PPOConfig.a2c()})
    """algorithms"""


DEFAULT = Settings()


def _training(s: Settings, agent: PPO) -> Callable[[], float]:
    """Seconds of some more updates, after a few that warm up."""
    agent.learn(4 * agent.per_update)
    return lambda: seconds(lambda: agent.learn(agent.steps + s.updates * agent.per_update))


def measure(s: Settings = DEFAULT) -> list[Result]:
    """Each algorithm by itself, and with tuned numbers."""
    rows = []
    for name, config in s.configs.items():
        tuned = SelfTuning(s.env, config, hyperparameters=SelfTuned(SelfTunedConfig(s.numbers)), seeds=s.seeds)
        plain = PPO(s.env, config, seeds=s.seeds)
        contenders = {"plain": _training(s, plain), "tuned": _training(s, tuned)}
        rounds = Rounds(contenders, s.rounds)
        rate = s.updates * plain.per_update * s.seeds / rounds.median("tuned")
        what = f"self-tuned {name}, {len(s.numbers)} numbers, {s.seeds} seeds, {s.env}"
        ratio, spread = rounds.ratio("tuned", "plain"), rounds.spread("tuned")
        rows.append(Result("self-tuning", what, rate, "env steps/s", f"{name} (time)", ratio, "ratio <= 3", spread))
    return rows
