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

from experiments.cli import speaking
from experiments.figures import COLOURS, count_axis, legend, panels, save_figure
from experiments.report import merge_scores, running_mean
from experiments.runs import CONFIG, SCORES, read_json, read_metrics
from learned_rl.evaluation import iqm_interval
from learned_rl.registry import make_family
from learned_rl.tasks.two_colours import TwoColoursFamily
from learned_rl.types import UserError

WEIGHT = "tuned/ent_coef"


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


def main(args: TwoColours) -> None:
    figure, (earned, course, mean) = panels(3)
    rows, handles = [], {}
    for run, colour in zip(args.runs, itertools.cycle(COLOURS), strict=False):
        if not (found := merge_scores([run])):
            raise UserError(f"{run} has no {SCORES}: expected a run that has ended.")
        (scores,) = found
        steps, rates = np.array(scores.returns.steps), scores.returns.returns[:, 0]  # [C], [C, seeds] reward per step
        total = (rates * np.diff(steps, prepend=0)[:, None]).sum(0)
        middle = iqm_interval(total[None])
        row = [scores.method, len(total), steps[-1], *(f"{x:.0f}" for x in (middle.point, middle.low, middle.high))]
        (handles[scores.method],) = earned.plot(steps, np.cumsum(rates.mean(1) * np.diff(steps, prepend=0)), c=colour)
        print(f"{scores.method}: total reward {middle.point:.0f} [{middle.low:.0f}, {middle.high:.0f}]", end="")
        if WEIGHT in (metrics := read_metrics(run)):
            before, after = around(run, period := phase(run), args.near)
            row += [f"{before.mean():.4f}", f"{after.mean():.4f}", f"{(after > before).sum()} of {len(after)}"]
            print(f"; entropy weight {row[-3]} before and {row[-2]} after switches, higher after {row[-1]}", end="")
            at, weight = metrics[WEIGHT]
            course.plot(at, running_mean(weight, max(len(at) // 500, 1)), c=colour, lw=0.8)
            width = period // 50
            bins = [weight[(at > period) & ((at - 1) % period // width == i)].mean() for i in range(50)]
            mean.plot(width * (np.arange(50) + 0.5), bins, c=colour)
        print()
        rows.append(row)
    if not rows:
        raise UserError("There are no runs: expected their folders.")
    earned.set(title="reward collected, mean over seeds", xlabel="environment steps of one lifetime")
    course.set(title="entropy weight, mean over seeds", xlabel="environment steps of one lifetime")
    mean.set(title="entropy weight, mean over phases", xlabel="environment steps since the switch")
    for ax in (earned, course, mean):
        count_axis(ax)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "totals.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seeds", "steps", "total", "low", "high", "weight before", "weight after", "higher"])
        table.writerows(rows)
    legend(figure, handles)
    save_figure(figure, args.out / "two_colours.png")
    print(f"figure: {args.out / 'two_colours.png'}")


if __name__ == "__main__":
    with speaking("two_colours"):
        main(tyro.cli(TwoColours))
