"""Two colours: what agents earned, and what their entropy weight did around the switches.

`python -m experiments.single_task.two_colours RUN...` reads run folders of the recipes two-colours-fixed, -mg and -bmg
(`experiments/recipes/two_colours.py`), which have the sources.
"""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from experiments.cli import speaking
from experiments.figures import COLOURS, count_axis, legend, panels, save_figure
from experiments.report import merge_scores, running_mean
from experiments.runs import CONFIG, SCORES, read_json, read_metrics
from learned_rl.evaluation import iqm_interval
from learned_rl.registry import make_family
from learned_rl.tasks.two_colours import TwoColoursFamily
from learned_rl.types import UserError

WEIGHT = "tuned/ent_coef"
BINS = 50  # of a phase, in the figure


@dataclass(frozen=True)
class TwoColours:
    """Total reward of finished runs, and their entropy weight before and after each switch."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, one for each method"""
    near: int = 20_000
    """environment steps before and after a switch that count as near it"""
    out: Path = Path("runs/two-colours")
    """folder of totals.csv and two_colours.png"""


def phase(run: Path) -> int:
    """Environment steps of a seed, over all its copies, between switches.

    Raises:
        UserError: a run of something else.
    """
    config = read_json(run / CONFIG)
    family = make_family(str(config.get("env")))
    if not isinstance(family, TwoColoursFamily):
        raise UserError(f"{run} is a run of {config.get('env')!r}: expected one of two_colours.")
    return family.period * config["config"]["n_envs"]


def around(run: Path, period: int, near: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean entropy weight in the `near` environment steps before and after each switch, [switches] both.

    Raises:
        UserError: the run ends before the first switch is over.
    """
    steps, weight = read_metrics(run)[WEIGHT]
    switches = np.arange(period, steps[-1] - near + 1, period)
    if not len(switches):
        raise UserError(f"{run} has {steps[-1]} environment steps: expected at least {period + near}.")
    before, after = (
        np.array([weight[(steps > s + start) & (steps <= s + start + near)].mean() for s in switches])
        for start in (-near, 0)
    )
    return before, after


def collected(run: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """The run's method, the environment steps [C] of its scores and the reward collected between them [C, seeds].

    Raises:
        UserError: a run that has not ended, or a folder of several.
    """
    if len(found := merge_scores([run])) != 1:
        raise UserError(f"{run} has scores of {len(found)} methods in {SCORES}: expected one run that has ended.")
    steps = np.array(found[0].returns.steps)
    return found[0].method, steps, found[0].returns.returns[:, 0] * np.diff(steps, prepend=0)[:, None]


def draw_weight(run: Path, course: Axes, mean: Axes, colour: str) -> None:
    """The entropy weight over the lifetime, and over the phases after the first one."""
    at, weight = read_metrics(run)[WEIGHT]
    course.plot(at, running_mean(weight, max(len(at) // 500, 1)), c=colour, lw=0.8)
    period, width = phase(run), phase(run) // BINS
    bins = [weight[(at > period) & ((at - 1) % period // width == i)].mean() for i in range(BINS)]
    mean.plot(width * (np.arange(BINS) + 0.5), bins, c=colour)


def main(args: TwoColours) -> None:
    if not args.runs:
        raise UserError("There are no runs: expected their folders.")
    figure, (earned, course, mean) = panels(3)
    earned.set(title="reward collected, mean over seeds", xlabel="environment steps of one lifetime")
    course.set(title="entropy weight, mean over seeds", xlabel="environment steps of one lifetime")
    mean.set(title="entropy weight, mean over phases", xlabel="environment steps since the switch")
    rows, handles = [], {}
    for run, colour in zip(args.runs, itertools.cycle(COLOURS), strict=False):
        method, steps, rewards = collected(run)
        middle = iqm_interval(rewards.sum(0)[None])
        row = [method, rewards.shape[1], steps[-1], *(f"{x:.0f}" for x in (middle.point, middle.low, middle.high))]
        (handles[method],) = earned.plot(steps, np.cumsum(rewards.mean(1)), c=colour)
        print(f"{method}: total reward {middle.point:.0f} [{middle.low:.0f}, {middle.high:.0f}]", end="")
        if WEIGHT in read_metrics(run):
            before, after = around(run, phase(run), args.near)
            row += [f"{before.mean():.4f}", f"{after.mean():.4f}", f"{(after > before).sum()} of {len(after)}"]
            print(f"; entropy weight {row[-3]} before and {row[-2]} after switches, higher after {row[-1]}", end="")
            draw_weight(run, course, mean, colour)
        print()
        rows.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "totals.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seeds", "steps", "total", "low", "high", "weight before", "weight after", "higher"])
        table.writerows(rows)
    for ax in (earned, course, mean):
        count_axis(ax)
    earned.yaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, handles)
    save_figure(figure, args.out / "two_colours.png")
    print(f"figure: {args.out / 'two_colours.png'}")


if __name__ == "__main__":
    with speaking("two_colours"):
        main(tyro.cli(TwoColours))
