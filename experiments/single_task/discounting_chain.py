"""Which critic judges decides where a discount goes: `python -m experiments.single_task.discounting_chain`.

Bonnet, Midgley, Laterre, "Debiasing Meta-Gradient Reinforcement Learning by Learning the Outer Value Function", 2022,
arXiv:2211.10550: A2C at discount 0.95, and with a discount learned by meta-gradient (MG) or bootstrapped meta-gradient
(BMG), judged with the values of the inner critic or of an outer one (`experiments.oracles.discounting_chain`). Exact
expectations need one run a variant; drawn episodes with normalised advantages (their fast variant) have seeds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.artist import Artist
from torch import nn

from experiments.cli import speaking
from experiments.figures import COLOURS, legend, panels, save_figure
from experiments.oracles.discounting_chain import DiscountingChain
from experiments.threads import set_threads
from meta_optimizers.bootstrapped import Bootstrapped, BootstrappedConfig
from meta_optimizers.outer_loop import OuterConfig, OuterLoop
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient

OUTER = {"A2C": False, "MG": False, "MG+outer": True, "BMG": False, "BMG+outer": True}


@dataclass(frozen=True)
class Chain:
    """Discounts on the discounting chain, by every variant."""

    exact: int = 5000
    """meta-steps with exact expectations"""
    drawn: int = 1000
    """meta-steps with drawn episodes and normalised advantages"""
    seeds: int = 10
    """P: runs with drawn episodes, side by side"""
    episodes: int = 128
    """drawn for each update"""
    every: int = 50
    """meta-steps between the rows of the table"""
    out: Path = Path("runs/discounting-chain")
    """folder of curves.csv and curves.png"""


def estimator(variant: str, window: int = 1) -> TruncatedMetaGradient:
    """As published: one update, and for BMG a target one step ahead, from whose start learning goes on."""
    if variant.startswith("BMG"):
        return Bootstrapped(BootstrappedConfig(window=window, bootstrap=1, bare=False, continue_from="window"))
    return TruncatedMetaGradient(TruncatedConfig(window=window))


def learn(variants: Sequence[str], steps: int, **settings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Expected returns and discounts [P] after every meta-step of P agents, each with a discount of its own.

    Args:
        variants: of each agent; they differ in their outer critic alone.
    """
    problem = DiscountingChain(len(variants), [OUTER[variant] for variant in variants], **settings)
    gamma = nn.Parameter(torch.zeros(len(variants), dtype=torch.float64))
    config = OuterConfig(learning_rate=0.0 if "A2C" in variants else 0.1, max_grad_norm=math.inf)
    loop = OuterLoop(problem, {"gamma": gamma}, estimator(variants[0]), config, stacked=True)
    for _ in range(steps):
        loop.step()
        yield problem.expected_return(), problem.gamma(loop.present)


def main(args: Chain) -> None:
    drawn = {"episodes": args.episodes, "normalize": True}
    runs = {"exact": (args.exact, 1, {}), "drawn, normalised": (args.drawn, args.seeds, drawn)}
    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = panels(2 * len(runs), columns=2)
    handles: dict[str, Artist] = {}
    with (args.out / "curves.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["data", "variant", "meta-step", "seed", "return", "gamma"])
        for (data, (steps, agents, settings)), beside in zip(runs.items(), (axes[:2], axes[2:]), strict=True):
            for variant, colour in zip(OUTER, COLOURS, strict=False):
                seen = [torch.stack(both, 1) for both in learn([variant] * agents, steps, **settings)]
                curves = seen[args.every - 1 :: args.every]
                at = range(args.every, steps + 1, args.every)
                for step, rows in zip(at, curves, strict=True):
                    numbered = enumerate(rows.tolist())
                    table.writerows([data, variant, step, seed, f"{g:.5f}", f"{x:.5f}"] for seed, (g, x) in numbered)
                mean = torch.stack(curves).mean(1)  # [marks, return and gamma]
                print(f"{data}: {variant} ends at return {mean[-1, 0]:.4f}, gamma {mean[-1, 1]:.3f}", flush=True)
                for ax, column, name in zip(beside, mean.T, ("return", "gamma"), strict=True):
                    (handles[variant],) = ax.plot(at, column, color=colour, ls="--" if variant == "A2C" else "-")
                    ax.set(title=f"{name}, {data}", xlabel="meta-steps")
    legend(figure, handles)
    save_figure(figure, args.out / "curves.png")
    print(f"figure: {args.out / 'curves.png'}")


if __name__ == "__main__":
    set_threads()
    with speaking("discounting_chain"):
        main(tyro.cli(Chain))
