"""Black-box search: the covariance matrix adaptation evolution strategy, on what whole lifetimes cost.

Hansen, Ostermeier, "Completely Derandomized Self-Adaptation in Evolution Strategies", 2001, as the library cmaes has
it (Nomura, Shibata, 2024, arXiv:2402.01373); the separable variant with a diagonal covariance is Ros, Hansen, "A Simple
Modification in CMA-ES Achieving Linear Time and Space Complexity", 2008. A member is a draw of the strategy, its cost
is all that the strategy is told, and the meta-parameters move to its new mean. EvoTorch also has SNES, but brings ray
and pandas with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from learned_rl.spaces import LogUniform, searched
from learned_rl.types import Tree, UserError, at_least, stream_seed
from meta_optimizers.estimator import Estimate
from meta_optimizers.evolution import Stacked, StackedConfig, everyone, seen
from meta_optimizers.problem import Eta, Problem

if TYPE_CHECKING:
    from cmaes import CMA, SepCMA

LARGEST = 2000  # numbers in eta with a full covariance
MEMORY = 2e8  # numbers in the outer products of all members, which the library holds at once

#: what a generation changes; the rest follows from the numbers of members and of meta-parameters
_CARRIED = ("_mean", "_sigma", "_C", "_p_sigma", "_pc", "_g")


@dataclass(frozen=True)
class BlackBoxConfig(StackedConfig):
    sigma: float = field(default=0.1, metadata=searched(LogUniform(1e-3, 1.0)))
    """standard deviation of the first members, in units of eta"""
    separable: bool = False
    """a diagonal covariance, for many meta-parameters"""
    tasks: int = 1
    """lifetimes of each member, each on a task of its own; a member's cost is their mean"""
    sharing: Literal["population", "none"] = "population"
    """who shares task, initial agent and luck: all members, so that costs compare, or nobody"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, tasks=self.tasks)
        if not 0 < self.sigma < float("inf"):
            raise UserError(f"sigma is {self.sigma}: expected a finite number above 0.")


class BlackBox(Stacked):
    """CMA-ES. The P lifetimes of all processes are laid out as [members, tasks]; a member whose cost is not finite is
    the worst. It moves eta by itself (`Estimate.move`), without the outer optimizer."""

    name, Config = "cma", BlackBoxConfig
    config: BlackBoxConfig
    least = 4
    _strategy: CMA | SepCMA | None = None

    @property
    def tasks(self) -> int:
        return self.config.tasks

    def streams(self, lifetimes: int) -> Tensor:
        self.members(lifetimes)
        each = torch.arange(lifetimes)
        return each % self.tasks if self.config.sharing == "population" else each

    @torch.no_grad()
    def __call__(self, problem: Problem, eta: Eta) -> Estimate:
        group, lifetimes, mean = problem.group, everyone(problem, eta), eta.flatten()
        strategy = self._strategy or self._begun(mean, self.members(lifetimes))
        strategy.reseed_rng(stream_seed("cma", self.seed, problem.meta_step) % 2**32)
        population = np.stack([strategy.ask() for _ in range(strategy.population_size)])
        rows = group.own(torch.arange(lifetimes, device=mean.device))
        own = torch.as_tensor(population).to(mean)[rows // self.tasks]
        outcome = self.evaluate(problem, Eta(eta.unflatten(own), stacked=True))

        self._strategy = strategy
        costs = group.gather(outcome.cost)
        costs = torch.where(group.gather(outcome.lost), costs.nanmean(), costs)  # neither good nor bad
        member = costs.view(-1, self.tasks).mean(1)
        if not bool(member.isfinite().any()):
            self.load_state_dict(self.state_dict())  # forgets the covariance's decomposition, as after a break
            return Estimate(None, ~outcome.alive, {"loss": float("nan")})
        worst_last = torch.where(member.isfinite(), member, torch.inf).tolist()
        strategy.tell(list(zip(population, worst_last, strict=True)))
        metrics = seen(problem, outcome, costs, self.config.window)
        metrics["sigma"] = float(vars(strategy)["_sigma"])
        there = eta.unflatten(torch.as_tensor(strategy.mean).to(mean).unsqueeze(0))
        return Estimate(None, ~outcome.alive, metrics, move={k: v[0] - eta.values[k] for k, v in there.items()})

    def check(self, eta: Eta, lifetimes: int) -> None:
        """Whether this can be with so many lifetimes of all processes, before anything is run.

        Raises:
            UserError: too few lifetimes, one is left over, or a covariance that does not go with eta.
        """
        self._fits(sum(v.numel() for v in eta.tensors), self.members(lifetimes))

    def _fits(self, d: int, members: int) -> None:
        if self.config.separable:
            if d < 2:
                raise UserError("separable needs at least 2 meta-parameters, here is 1: expected separable = False.")
        elif d > LARGEST or members * d * d > MEMORY:
            raise UserError(
                f"{d} meta-parameters with {members} members are too many for a full covariance: expected at most "
                f"{LARGEST}, fewer with many members, or separable = True."
            )

    def _begun(self, mean: Tensor, members: int) -> CMA | SepCMA:
        """A strategy around a mean [d]."""
        from cmaes import CMA, SepCMA  # it imports scipy.stats, which takes half as long as torch

        self._fits(mean.numel(), members)
        kind = SepCMA if self.config.separable else CMA
        return kind(mean.double().cpu().numpy().copy(), self.config.sigma, population_size=members)

    def state_dict(self) -> Tree:
        if self._strategy is None:
            return super().state_dict()
        carried = {f"strategy{k}": torch.from_numpy(np.array(vars(self._strategy)[k])) for k in _CARRIED}
        return super().state_dict() | carried | {"members": torch.tensor(self._strategy.population_size)}

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        self._strategy = None
        if "members" in state:
            self._strategy = self._begun(state["strategy_mean"], int(state["members"]))
            saved = {k: state[f"strategy{k}"] for k in _CARRIED}
            vars(self._strategy).update({k: v.numpy().copy() if v.dim() else v.item() for k, v in saved.items()})
