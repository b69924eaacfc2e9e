"""`make demo`: the whole path on real input in less than ten minutes, through the same functions as the command line.

Meta-learn LPG on random grid worlds, compare it with tuned A2C on held-out grids, plug it into PPO on an environment
it never saw, and put everything into one report.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from rich.console import Console

from experiments.cli import speaking
from experiments.evaluate import Evaluate, evaluate
from experiments.meta_train import MetaTrain, meta_train
from experiments.recipes import get_recipe
from experiments.report import write_report
from experiments.threads import set_threads


def demo(minutes: float, out: Path) -> None:
    """Meta-train, evaluate twice, report."""
    console, command = Console(), ["make", "demo"]

    console.rule(f"1/3  meta-learn LPG on random grid worlds ({minutes:g} minutes)")
    recipe = dataclasses.replace(get_recipe("lpg-gridworld"), minutes=minutes, validate_every=50)
    home = out / "meta-train"
    component = meta_train(MetaTrain(recipe, out=home), command)

    console.rule("2/3  fresh agents on held-out grids, beside tuned A2C")
    held_out = out / "held-out"
    options = Evaluate(baselines="a2c,untrained", tasks=32, seeds=2, trials=32, tuning_tasks=16, out=held_out)
    evaluate(component, options, command)

    console.rule("3/3  plug it into PPO on an environment it never saw")
    unseen = out / "unseen"
    catch = {"family": "catch/5x5", "tasks": 1, "seeds": 8, "updates": 50}  # networks: dearer than the grids' tables
    options = dataclasses.replace(options, **catch, trials=16, tuning_tasks=3, out=unseen)  # type: ignore[arg-type]
    evaluate(component, options, command)

    report = write_report([home, held_out, unseen], out / "report.html", baseline="a2c")
    console.rule("done")
    console.print(f"component  {component}\nreport     {report}\nraw scores {held_out / 'scores.csv'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="wall time of meta-training")
    parser.add_argument("--out", type=Path, default=Path(f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"))
    args = parser.parse_args()
    with speaking("demo", saved="what was finished lies in {path}"):
        set_threads()
        demo(args.minutes, args.out)


if __name__ == "__main__":
    main()
