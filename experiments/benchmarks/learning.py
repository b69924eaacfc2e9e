"""Learning curves of PPO and DPO beside Stable-Baselines3's PPO at equal settings, on two gymnasium environments.

A curve is the mean return of the training episodes that ended in each bin of environment steps. Scores are the
interquartile mean over seeds of a curve's last tenth and of its whole (its area per step).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.benchmarks.contenders import NO_SB3, SB3, PPOSettings, has_sb3, ours, sb3
from experiments.benchmarks.measure import Result, processes
from learned_rl.evaluation import Interval, iqm_interval

NAME = "learning_cartpole_acrobot"
OURS = {"PPO": "ppo_clip", "DPO": "dpo"}  # method -> objective
METHODS = (*OURS, SB3)

#: (environment, method) -> [seeds, bins] mean return of the bin's episodes, NaN where none ended.
Curves = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison."""

    steps: Mapping[str, int] = field(default_factory=lambda: {"CartPole-v1": 100_000, "Acrobot-v1": 200_000})
    """environment steps of one seed, by environment"""
    bin: int = 10_000
    """environment steps of one bin"""
    seeds: int = 10
    ppo: PPOSettings = field(default_factory=PPOSettings)
    workers: int = 2
    """processes, each with one thread"""


DEFAULT = Settings()


class _Bins:
    """Mean return of the episodes that ended in each bin, for some seeds."""

    def __init__(self, seeds: int, steps: int, width: int) -> None:
        self.width = width
        self.total, self.count = np.zeros((2, seeds, max(1, steps // width)))

    def add(self, step: int, returns: np.ndarray, count: np.ndarray) -> None:
        """Sums of returns [seeds] of `count` [seeds] episodes that ended in the update whose last step is `step`."""
        i = min((step - 1) // self.width, self.total.shape[1] - 1)
        self.total[:, i] += returns
        self.count[:, i] += count

    def means(self) -> np.ndarray:
        """[seeds, bins]; NaN where no episode ended."""
        with np.errstate(invalid="ignore"):
            return self.total / self.count


def our_curves(env: str, objective: str, s: Settings) -> np.ndarray:
    """[seeds, bins] of this project's PPO, all seeds at once."""
    agent, steps, bins = ours(env, s.ppo, 0, objective, s.seeds), 0, _Bins(s.seeds, s.steps[env], s.bin)
    inner = agent.lifetimes.plain()
    while steps < s.steps[env]:
        _, ended = agent.lifetimes.advance(inner)
        steps += s.ppo.per_update
        bins.add(steps, ended.returns.numpy(), ended.count.numpy())
    return bins.means()


def sb3_curve(env: str, seed: int, s: Settings) -> np.ndarray:
    """[1, bins] of Stable-Baselines3's PPO with one seed; the episodes are those that its monitors saw."""
    bins, rollout = _Bins(1, s.steps[env], s.bin), s.ppo.per_update

    def see(local: dict, _: dict) -> bool:
        ended = [info["episode"]["r"] for info in local["infos"] if "episode" in info]
        update = math.ceil(local["self"].num_timesteps / rollout)
        bins.add(update * rollout, np.array([sum(ended)]), np.array([len(ended)]))
        return True

    sb3(env, s.ppo, seed).learn(s.steps[env], callback=see)
    return bins.means()


def all_curves(s: Settings) -> Curves:
    """Every method on every environment; those of Stable-Baselines3 only where it is installed."""
    with processes(s.workers) as pool:
        own = {(e, m): pool.submit(our_curves, e, o, s) for e in s.steps for m, o in OURS.items()}
        peers = {e: [pool.submit(sb3_curve, e, i, s) for i in range(s.seeds)] for e in s.steps if has_sb3()}
        curves = {key: job.result() for key, job in own.items()}
        return curves | {(e, SB3): np.concatenate([job.result() for job in jobs]) for e, jobs in peers.items()}


def scores(curves: np.ndarray) -> dict[str, Interval]:
    """Interquartile means with intervals over seeds, from curves [seeds, bins]."""
    bins = curves.shape[1]
    last = curves[:, bins - max(1, round(bins / 10)) :]
    return {
        "the last tenth": iqm_interval(np.nanmean(last, 1)[None]),
        "the whole run": iqm_interval(np.nanmean(curves, 1)[None]),
    }


def write_csv(path: Path, curves: Curves, width: int) -> None:
    """Rows env, method, seed, step (end of the bin), return; nothing for a bin in which no episode ended."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("env", "method", "seed", "step", "return"))
        for (env, method), values in curves.items():
            for (seed, i), value in np.ndenumerate(values):
                if math.isfinite(value):
                    rows.writerow((env, method, seed, (i + 1) * width, f"{value:.6g}"))


def draw(path: Path, curves: Curves, s: Settings) -> None:
    """One panel an environment: interquartile mean over seeds, with its 95 % interval."""
    figure = Figure(figsize=(4.5 * len(s.steps), 3.5), layout="constrained")
    panels = figure.subplots(1, len(s.steps), squeeze=False)[0]
    for panel, env in zip(panels, s.steps, strict=True):
        for method, style in zip(METHODS, ("-", "--", ":"), strict=True):
            if (env, method) not in curves:
                continue
            columns = [c[np.isfinite(c)] for c in curves[env, method].T]
            seen = [(i + 1, iqm_interval(c[None])) for i, c in enumerate(columns) if c.size]
            x = [i * s.bin for i, _ in seen]
            panel.plot(x, [v.point for _, v in seen], style, label=method)
            panel.fill_between(x, [v.low for _, v in seen], [v.high for _, v in seen], alpha=0.2)
        panel.set(title=env, xlabel="environment steps of one seed", ylabel="return of training episodes")
        panel.legend()
    figure.suptitle(f"interquartile mean over {s.seeds} seeds, 95 % intervals")
    figure.savefig(path, dpi=150)


def measure(folder: Path, s: Settings = DEFAULT) -> list[Result]:
    """Scores of every method; the curves go to `folder` as CSV and as a figure."""
    curves = all_curves(s)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{NAME}.csv", curves, s.bin)
    draw(folder / f"{NAME}.png", curves, s)
    results = []
    for (env, method), values in curves.items():
        for what, found in scores(values).items():
            note = f"95 % interval [{found.low:.4g}, {found.high:.4g}], {s.seeds} seeds"
            results.append(Result("learning", f"{env}, {method}, {what}", found.point, "return", note=note))
    if not has_sb3():
        results.append(Result("learning", SB3, None, "return", note=NO_SB3))
    return results
