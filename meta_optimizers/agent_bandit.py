"""Which step size and prediction weight each new lifetime gets: the bandit of LPG.

Oh et al., 2020, arXiv:2007.08794, section 3.5: at the start of a lifetime draw an arm alpha with probability
proportional to exp((R(alpha) + rho / sqrt(N(alpha))) / tau), with R the mean over the arm's last 10 lifetimes of the
final return and N its count. It keeps unstable lifetimes rare and eta from fitting a single step size. The paper keeps
one bandit per environment; a family here is a distribution over tasks, so there is one for all of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.component import Hyper
from learned_rl.types import Tree, at_least

MEMORY = 10  # lifetimes over which an arm's return is averaged


@dataclass(frozen=True)
class AgentBanditConfig:
    learning_rates: tuple[float, ...] = ()
    """agent step sizes to choose from; empty: the configured one"""
    prediction_coefs: tuple[float, ...] = ()
    """prediction weights (alpha_y) to choose from; empty: the configured one"""
    temperature: float = 0.1
    """tau: lower is greedier, in units of return"""
    exploration: float = 0.2
    """rho: bonus of arms rarely tried, in units of return"""

    def __post_init__(self) -> None:
        at_least(1e-6, temperature=self.temperature)


class AgentBandit:
    """Arms are pairs (learning rate, prediction weight)."""

    def __init__(self, config: AgentBanditConfig, base: Hyper, lifetimes: int, generator: torch.Generator) -> None:
        rates, coefs = (
            config.learning_rates or (base.learning_rate,),
            config.prediction_coefs or (base.prediction_coef,),
        )
        self.config, self.generator = config, generator
        self.arms = torch.tensor(list(itertools.product(rates, coefs)))  # [arms, 2]
        self.recent = torch.full((len(self.arms), MEMORY), float("nan"))
        self.count = torch.zeros(len(self.arms))
        self.arm = torch.zeros(lifetimes, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """[arms]; an arm never tried has an infinite bonus and shares the draw with its like.

        An arm that was tried but has no return on record yet stands at the mean of those that have.
        """
        if bool((untried := self.count == 0).any()):
            return untried / untried.sum()
        value = self.recent.nanmean(1)
        value = torch.where(value.isfinite(), value, value.nanmean().nan_to_num())
        score = value + self.config.exploration / self.count.sqrt()
        return (score / self.config.temperature).softmax(0)

    def record(self, which: Tensor, final_return: Tensor, broken: Tensor) -> None:
        """Final returns `[P]` of the lifetimes that ended (`which [P]`).

        One that broke counts as the worst return on record; one without any finished episode tells nothing.
        """
        known = self.recent[self.recent.isfinite()]
        worst = known.min() if len(known) else torch.zeros(())
        returns = torch.where(broken.cpu(), worst, final_return.cpu().float())
        for p in (which.cpu() & returns.isfinite()).nonzero().flatten().tolist():
            arm = self.arm[p]
            self.recent[arm] = torch.cat([self.recent[arm, 1:], returns[p : p + 1]])

    def assign(self, which: Tensor) -> None:
        """Draw arms for the lifetimes that begin, one after the other, so that untried arms are spread."""
        for p in which.cpu().nonzero().flatten().tolist():
            self.arm[p] = torch.multinomial(self.probabilities(), 1, generator=self.generator)
            self.count[self.arm[p]] += 1

    def hyper(self, base: Hyper, like: Tensor, lifetimes: Tensor) -> Hyper:
        """The base numbers with the arms of some lifetimes (indices [P]), `[P, 1]`; the base itself where there is
        nothing to choose."""
        if len(self.arms) == 1:
            return base
        rate, coef = self.arms[self.arm[lifetimes]].to(like).split(1, 1)
        return base.replace(learning_rate=rate, prediction_coef=coef)

    def state_dict(self) -> Tree:
        named = {"recent": self.recent, "count": self.count, "arm": self.arm, "generator": self.generator.get_state()}
        return {k: v.clone() for k, v in named.items()}

    def load_state_dict(self, state: Tree) -> None:
        self.recent, self.count, self.arm = state["recent"].clone(), state["count"].clone(), state["arm"].clone()
        self.generator.set_state(state["generator"])
