"""LIRPG beside the same agent without it, over step sizes: return over the lifetime and at its end.

`python -m experiments.single_task.lirpg RUN...` reads run folders of `learned-rl train delayed/...`, with and without
`--reward lirpg`, at several `--config.hyper.learning-rate`s.

Zheng, Oh, Singh, "On Learning Intrinsic Rewards for Policy Gradient Methods", NeurIPS 2018, arXiv:1804.06459.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.artist import Artist

from experiments.cli import speaking
from experiments.figures import COLOURS, legend, panels, save_figure
from experiments.report import merge_scores
from experiments.runs import CONFIG, SCORES, read_json
from learned_rl.evaluation import Interval, iqm_interval
from learned_rl.types import UserError

HEADER = ["env", "method", "learning rate", "seeds", "steps", "lifetime", "low", "high", "final", "low", "high"]
PLAIN, LEARNED = "the delayed reward alone", "with LIRPG"


@dataclass(frozen=True)
class Lirpg:
    """Runs with and without LIRPG, over step sizes."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    out: Path = Path("runs/lirpg")
    """folder of returns.csv and lirpg.png"""


@dataclass(frozen=True)
class Point:
    """One run: where, with which step size, with or without LIRPG; return over its lifetimes and at their end."""

    env: str
    method: str
    rate: float
    seeds: int
    steps: int
    lifetime: Interval
    final: Interval


def point(run: Path) -> Point:
    """What a run measured.

    Raises:
        UserError: a run that has not ended, or a folder of several.
    """
    if len(found := merge_scores([run])) != 1:
        raise UserError(f"{run} has scores of {len(found)} methods in {SCORES}: expected one run that has ended.")
    config, curves = read_json(run / CONFIG), found[0].returns
    method = PLAIN if config.get("reward") is None else LEARNED
    rate = float(config["config"]["hyper"]["learning_rate"])
    lifetime = iqm_interval(curves.returns[1:].mean(0))  # the first row is what agents begin with
    seeds = curves.returns.shape[1] * curves.returns.shape[2]
    last = int(curves.steps[-1])
    return Point(config["env"], method, rate, seeds, last, lifetime, iqm_interval(curves.returns[-1]))


def main(args: Lirpg) -> None:
    if not args.runs:
        raise UserError("There are no runs: expected their folders.")
    points = sorted(map(point, args.runs), key=lambda p: (p.env, p.method, p.rate))
    envs = list(dict.fromkeys(p.env for p in points))
    figure, axes = panels(len(envs))
    handles: dict[str, Artist] = {}
    for env, ax in zip(envs, axes, strict=True):
        rates = sorted({p.rate for p in points if p.env == env})
        for method, colour in zip((PLAIN, LEARNED), COLOURS, strict=False):
            own = [p for p in points if (p.env, p.method) == (env, method)]
            middle = [p.lifetime for p in own]
            error = np.array([[m.point - m.low, m.high - m.point] for m in middle]).T.reshape(2, -1)
            bar = ax.errorbar([p.rate for p in own], [m.point for m in middle], error, c=colour, marker="o", capsize=3)
            handles[method] = bar.lines[0]
        ax.set_xscale("log")
        ax.minorticks_off()
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.set(title=env, xlabel="learning rate of the agent", ylabel="return, mean over the lifetime")
    legend(figure, handles)
    args.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, args.out / "lirpg.png")
    with (args.out / "returns.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        for p in points:
            numbers = [f"{x:.1f}" for m in (p.lifetime, p.final) for x in (m.point, m.low, m.high)]
            table.writerow([p.env, p.method, f"{p.rate:g}", p.seeds, p.steps, *numbers])
            print(f"{p.env}, {p.method}, {p.rate:g}: lifetime {p.lifetime}, final {p.final}")
    print(f"figure: {args.out / 'lirpg.png'}")


if __name__ == "__main__":
    with speaking("lirpg"):
        main(tyro.cli(Lirpg))
