"""PPO's speed on CartPole against Stable-Baselines3 and a CleanRL-style loop, ten seeds at once, and what DPO costs.

Every timed run is training by a fresh agent: environment, rollout, update and the bookkeeping of episode returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.benchmarks.cleanrl_style import CleanRLStyle
from experiments.benchmarks.contenders import NO_SB3, SB3, PPOSettings, has_sb3, ours, sb3
from experiments.benchmarks.measure import Result, Rounds, seconds

ENV, BUILT_IN = "CartPole-v1", "control/cartpole-default"
CLEANRL = "CleanRL-style loop"

#: Trains for that many more environment steps (of each seed).
Learn = Callable[[int], object]


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    ppo: PPOSettings = field(default_factory=PPOSettings)
    """of every contender"""
    warm_up: int = 2
    """updates of each fresh agent that are not measured"""
    updates: int = 25
    """updates that are, in each round"""
    seeds: int = 10
    """agents of the run with many seeds"""
    calls: int = 50
    """updates in each round of the comparison without an environment"""
    repeats: int = 5
    """rounds"""


DEFAULT = Settings()


def measure(s: Settings = DEFAULT) -> list[Result]:
    """All rows: speed, many seeds, cost of DPO."""
    return [*_speed(s), *_dpo(s)]


def _ours(s: Settings, env: str = ENV, objective: str | None = None, seeds: int = 1) -> Learn:
    agent = ours(env, s.ppo, 0, objective, seeds)
    # With a listener, so that episode returns are followed and metrics computed, as the peers always do.
    return lambda steps: agent.learn(agent.steps + steps, log=lambda step, metrics: None)


def _sb3(s: Settings) -> Learn:
    agent = sb3(ENV, s.ppo, 0)
    return lambda steps: agent.learn(steps, reset_num_timesteps=False)


def _training(s: Settings, make: Callable[[], Learn]) -> Callable[[], float]:
    """Seconds of training by a fresh agent, after its warm-up."""

    def run() -> float:
        learn = make()
        learn(s.warm_up * s.ppo.per_update)
        return seconds(lambda: learn(s.updates * s.ppo.per_update))

    return run


def _speed(s: Settings) -> list[Result]:
    many = f"{s.seeds} seeds at once"
    make: dict[str, Callable[[], Learn]] = {
        "ours": lambda: _ours(s),
        CLEANRL: lambda: CleanRLStyle(ENV, s.ppo, 0).learn,
        many: lambda: _ours(s, BUILT_IN, seeds=s.seeds),
    }
    if has_sb3():
        make[SB3] = lambda: _sb3(s)
    rounds = Rounds({name: _training(s, m) for name, m in make.items()}, s.repeats)
    rates = {name: s.updates * s.ppo.per_update / rounds.median(name) for name in make}
    rates[many] *= s.seeds

    def row(name: str, what: str, peer: str = "", target: str = "", times: int = 1) -> Result:
        # A ratio of rates is the inverse ratio of times.
        ratio = times * rounds.ratio(peer, name) if peer in rates else None
        note = NO_SB3 if peer and ratio is None else rounds.spread(name)
        return Result("ppo", what, rates[name], "env steps/s", peer, ratio, target, note)

    one, ten = f"one seed, {ENV}", f"{many}, {BUILT_IN}"
    results = [
        row("ours", one, SB3, "ratio >= 1.5"),
        row("ours", one, CLEANRL, "ratio >= 1.0"),
        row(many, ten, SB3, "ratio >= 10", s.seeds),
    ]
    return results + [row(name, f"{name}, one seed, {ENV}") for name in (SB3, CLEANRL) if name in rates]


def _update(s: Settings, objective: str | None) -> Callable[[], float]:
    """Seconds of updates on one rollout, again and again, without an environment."""
    lifetimes = ours(BUILT_IN, s.ppo, 0, objective).lifetimes
    inner = lifetimes.plain()
    trajectory = lifetimes.collect(inner)
    lifetimes.advance(inner, trajectory)

    def run() -> None:
        for _ in range(s.calls):
            lifetimes.advance(inner, trajectory)

    return lambda: seconds(run)


def _dpo(s: Settings) -> list[Result]:
    training = {name: _training(s, lambda name=name: _ours(s, ENV, name)) for name in ("dpo", "ppo_clip")}  # type: ignore[misc]
    updates = {name: _update(s, name) for name in ("dpo", "ppo_clip")}
    results = []
    for what, runs, count in ((f"training on {ENV}", training, s.updates), ("the update alone", updates, s.calls)):
        rounds = Rounds(runs, s.repeats)
        time, ratio = rounds.median("dpo") / count, rounds.ratio("dpo", "ppo_clip")
        name = f"DPO, {what}"
        results.append(Result("ppo", name, time, "s per update", "PPO", ratio, "ratio <= 1.1", rounds.spread("dpo")))
    return results
