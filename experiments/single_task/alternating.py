"""A discount for each state, where every other reward is noise: `python -m experiments.single_task.alternating`.

After the first experiment of Xu, van Hasselt, Silver, "Meta-Gradient Reinforcement Learning", 2018, arXiv:1805.09801,
with the constants of a published small variant (TorchOpt's MGRL example; the paper's own are not known). Ten states in
a row and no choice: even ones pay fresh noise N(0, 1), odd ones 0.1. A value is learned from zero by one step of 0.5
towards returns with a discount for each state, and judged by the squared error to the undiscounted returns of another
pass. Discounts begin at 0.5; those into noise should fall, those into signal should rise. They are learned over many
values that begin anew, so this is the meta-trainer with lifetimes of one update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from experiments.cli import speaking
from experiments.figures import COLOURS, panels, save_figure
from experiments.threads import set_threads
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from learned_rl.tasks.alternating import AlternatingFamily
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.mgrl import MGRL, MGRLConfig

STATES = 10


@dataclass(frozen=True)
class Alternating:
    """A discount for each state of the alternating process."""

    steps: int = 10_000
    """meta-steps"""
    lifetimes: int = 8
    """P: passes that are averaged in one meta-step"""
    seeds: int = 5
    """runs, one after the other"""
    out: Path = Path("runs/alternating")
    """folder of discounts.csv and discounts.png"""


def trainer(lifetimes: int, seed: int) -> MetaTrainer:
    """The experiment, ready to run."""
    numbers = Hyper(learning_rate=0.5, gamma=0.5, gae_lambda=1.0, vf_coef=1.0, max_grad_norm=math.inf)
    agent = PPOConfig(n_envs=1, n_steps=STATES, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=numbers)
    config = MetaTrainConfig(
        lifetimes=lifetimes,
        horizon=1,
        agent=agent,
        learning_rate=0.5,
        optimizer="sgd",
        max_grad_norm=math.inf,
        estimator=TruncatedConfig(window=1),
        loss=OuterLossConfig(policy_entropy=0.0, value=1.0),
        critic=OuterCriticConfig(source="agent", gamma=1.0, gae_lambda=1.0, normalize=False),
    )
    learned = MGRL(MGRLConfig(numbers=("gamma",), per_state=("gamma",), embedding=False))
    return MetaTrainer(AlternatingFamily(str(STATES)), learned, config, seed)


def discounts(trained: MetaTrainer) -> np.ndarray:
    """[states - 1] the discount of the transition into each state but the first."""
    eta = trained.eta["hyperparameters.eta.gamma"].detach()  # stop: to look at
    return eta.sigmoid()[1:].numpy()  # sigmoid(0) is the 0.5 that it begins with


def main(args: Alternating) -> None:
    found = []
    for seed in range(args.seeds):
        trained = trainer(args.lifetimes, seed)
        for _ in range(args.steps):
            trained.step()
        found.append(discounts(trained))
        print(f"seed {seed}: " + " ".join(f"{x:.2f}" for x in found[-1]))
    args.out.mkdir(parents=True, exist_ok=True)
    table = np.stack(found)
    header = ",".join(f"into {i} ({'noise' if i % 2 == 0 else 'signal'})" for i in range(1, STATES))
    np.savetxt(args.out / "discounts.csv", table, delimiter=",", header=header, comments="", fmt="%.4f")
    figure, (ax,) = panels(1)
    into = np.arange(1, STATES)
    for kind, colour, parity in (("signal", COLOURS[0], 1), ("noise", COLOURS[1], 0)):
        at = into % 2 == parity
        ax.bar(into[at], table[:, at].mean(0), color=colour, alpha=0.5, label=f"into {kind}")
        for row in table:
            ax.plot(into[at], row[at], "o", color=colour, ms=3)
    ax.axhline(0.5, color="black", lw=0.8, ls=":")
    ax.set(xlabel="state that the transition leads to", ylabel="learned discount", ylim=(0, 1))
    ax.legend(frameon=False)
    save_figure(figure, args.out / "discounts.png")
    print(f"figure: {args.out / 'discounts.png'}")


if __name__ == "__main__":
    set_threads()
    torch.manual_seed(0)
    with speaking("alternating"):
        main(tyro.cli(Alternating))
