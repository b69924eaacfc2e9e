"""Evolution strategies: perturb the meta-parameters, see who does better, move that way.

Salimans, Ho, Chen, Sidor, Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017,
arXiv:1703.03864. Pair i tries eta + sigma z_i and eta - sigma z_i with z_i ~ N(0, I), and with F the members' costs

    g = 1/(2 n sigma) sum_i (F(eta + sigma z_i) - F(eta - sigma z_i)) z_i,        i = 1..n

estimates the gradient of E F(eta + sigma z), whatever happens inside a lifetime: nothing is differentiated. Members of
a pair share task, initial agent and luck, so that only eta tells them apart. With a window as long as a lifetime there
is no other bias than the smoothing; a shorter window with carried states is truncated evolution, as biased as a
truncated unroll (each lifetime goes on from its own state, so that no member is favoured).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import scipy  # whose `stats` are imported where first used
import torch
from torch import Tensor

from learned_rl.component import Metrics, finite
from learned_rl.spaces import Integers, LogUniform, searched
from learned_rl.types import Tree, UserError, at_least, stream
from meta_optimizers.diagnostics import signal_to_noise
from meta_optimizers.estimator import Estimate, Estimator, EstimatorConfig
from meta_optimizers.problem import Eta, Problem
from meta_optimizers.truncated import mean


@dataclass(frozen=True)
class StackedConfig(EstimatorConfig):
    """What estimators have in common that compare lifetimes under meta-parameters of their own."""

    window: int = field(default=100, metadata=searched(Integers(1, 100, log=True)))
    """K: inner updates of one estimate; whole lifetimes: their horizon, of which it must otherwise be a part"""
    fitness: Literal["last", "mean"] = "mean"
    """which states of the window are judged: the one that comes out of it, or the ones after every update"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, window=self.window)


@dataclass(frozen=True)
class Outcome:
    """How lifetimes did in a window.

    Attributes:
        cost:    [P]; not a number where a lifetime broke.
        lost:    [P] bool: it had broken before this window, which says nothing about these meta-parameters.
        metrics: name -> [P].
    """

    cost: Tensor
    lost: Tensor
    metrics: Metrics

    @property
    def alive(self) -> Tensor:
        """[P] bool."""
        return self.cost.isfinite()


class Stacked(Estimator):
    """Runs every lifetime under meta-parameters of its own, without a graph."""

    stacked, staggered = True, False
    config: StackedConfig
    least: ClassVar[int]  # members that make an estimate
    unit: ClassVar[int] = 1  # members that belong together
    _pending: Tree | None = None  # data of the present state, to learn from

    @property
    def updates(self) -> int:
        return self.config.window

    @property
    def rollouts(self) -> int:
        return self.config.window + 1

    def check(self, eta: Eta, lifetimes: int) -> None:
        self.members(lifetimes)

    @property
    def tasks(self) -> int:
        """Lifetimes of one member."""
        return 1

    @torch.no_grad()
    def evaluate(self, problem: Problem, eta: Eta) -> Outcome:
        """A window under stacked `eta`; leaves the problem at its end. The cost is that of the data collected at the
        states after the updates, which the next update learns from, and the penalties of the updates."""
        state, mean_of_all = problem.present(), self.config.fitness == "mean"
        lost = ~finite(state["theta"])
        data, self._pending = problem.collect(state) if self._pending is None else self._pending, None
        costs, penalties, alive, metrics = [], [], [], []
        for k in range(self.config.window):
            moved = problem.step(state, data, eta)
            state, data = moved.state, problem.collect(moved.state)
            if mean_of_all or k + 1 == self.config.window:
                costs.append(problem.cost(data))
            penalties.append(moved.penalty)
            alive.append(moved.alive)
            metrics.append(moved.metrics)
        problem.commit(state)
        self._pending = data
        cost = torch.stack(costs).mean(0) + torch.stack(penalties).mean(0)
        whole = torch.stack(alive).all(0) & finite(state["theta"]) & cost.isfinite()
        return Outcome(torch.where(whole, cost, torch.nan), lost, mean(metrics))

    def members(self, lifetimes: int) -> int:
        """How many members they make.

        Raises:
            UserError: too few, or a lifetime is left over.
        """
        step, least = self.unit * self.tasks, self.least * self.tasks
        if lifetimes % step or lifetimes < least:
            raise UserError(
                f"{lifetimes} lifetimes for {self.name!r}, {self.tasks} a member: expected a multiple of {step}, "
                f"at least {least}; the nearest is {max(round(lifetimes / step) * step, least)}."
            )
        return lifetimes // self.tasks

    def begin(self, which: Tensor, elsewhere: bool = False) -> None:
        if elsewhere or bool(which.any()):
            self._pending = None  # some of it belongs to agents that are no more; all processes collect together

    def state_dict(self) -> Tree:
        return {f"pending/{k}": v.clone() for k, v in (self._pending or {}).items()}

    def load_state_dict(self, state: Tree) -> None:
        self._pending = {k.removeprefix("pending/"): v for k, v in state.items() if k.startswith("pending/")} or None


def everyone(problem: Problem, eta: Eta) -> int:
    """Lifetimes of all processes."""
    return int(problem.group.sum(eta.tensors[0].new_tensor(problem.lifetimes, dtype=torch.float64)))


def seen(problem: Problem, outcome: Outcome, costs: Tensor, window: int) -> dict[str, float]:
    """What to log of a window, `costs` being those of all lifetimes."""
    alive = outcome.alive
    metrics = {k: v[alive].mean().item() for k, v in outcome.metrics.items()} if bool(alive.any()) else {}
    return {"loss": costs.nanmean().item(), "window": float(window)} | metrics


# --- shaping: costs [n, 2] of pairs, not a number where a member broke, to what weighs the perturbations -------------


def _as_it_is(cost: Tensor) -> Tensor:
    return cost


def centred_rank(cost: Tensor) -> Tensor:
    """Ranks among all members, from -0.5 (the best) to 0.5; ties share their average, what is not finite is worst."""
    ranks = torch.as_tensor(scipy.stats.rankdata(torch.where(cost.isfinite(), cost, torch.inf).flatten().cpu().numpy()))
    return ((ranks - 1) / (cost.numel() - 1) - 0.5).to(cost).view_as(cost)


def z_score(cost: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all finite members; all 0 where these are equal."""
    finite = cost[cost.isfinite()]
    return (cost - finite.mean()) / finite.std(correction=0).clamp(min=torch.finfo(cost.dtype).tiny)


def winner(cost: Tensor) -> Tensor:
    """-1 for the better member of a pair, 1 for the worse, 0 for both where they are equal."""
    return (cost - cost.flip(1)).sign()


SHAPING: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _as_it_is,
    "rank": centred_rank,
    "z_score": z_score,
    "pair": winner,
}


# --- the estimator ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AntitheticConfig(StackedConfig):
    """What estimators have in common that compare pairs."""

    sigma: float = field(default=0.03, metadata=searched(LogUniform(1e-3, 1.0)))
    """standard deviation of the perturbation, in units of eta"""
    sigma_half_life: float = math.inf
    """meta-steps in which it halves"""
    shaping: Literal["none", "rank", "z_score", "pair"] = "none"
    """what costs become before they weigh perturbations: themselves (the only choice without bias), centred ranks among
    all members, standardised costs, or who won within the pair (for pairs on tasks of unlike scale)"""
    sharing: Literal["pair", "population"] = "pair"
    """who shares task, initial agent and luck: the members of a pair, or all members"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma", "sigma_half_life"):
            if not (value := getattr(self, name)) > 0:
                raise UserError(f"{name} is {value}: expected more than 0.")
        if math.isinf(self.sigma):
            raise UserError("sigma is inf: expected a finite number.")


@dataclass(frozen=True)
class EvolutionConfig(AntitheticConfig):
    tasks: int = 1
    """lifetimes of each member, each on a task of its own; a member's cost is their mean"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, tasks=self.tasks)


class Evolution(Stacked):
    """Antithetic evolution strategies.

    The P lifetimes of all processes are laid out as [pairs, tasks, 2]: lifetimes 2 i and 2 i + 1 are opposite members
    on the same task. Perturbations are drawn on every process from the seed; only costs are exchanged. A lifetime that
    is not finite breaks its partner, since both must begin anew together; its member is the worst by rank, and where
    ranks are not asked for, the difference of the two is 0.
    """

    name = "es"
    Config: ClassVar[type[EstimatorConfig]] = EvolutionConfig
    config: AntitheticConfig
    least = unit = 2

    @property
    def tasks(self) -> int:
        return getattr(self.config, "tasks", 1)

    def streams(self, lifetimes: int) -> Tensor:
        self.members(lifetimes)
        pair_and_task = torch.arange(lifetimes) // 2
        return pair_and_task if self.config.sharing == "pair" else pair_and_task % self.tasks

    @torch.no_grad()
    def __call__(self, problem: Problem, eta: Eta) -> Estimate:
        group, lifetimes, tasks = problem.group, everyone(problem, eta), self.tasks
        mean, pairs = eta.flatten(), self.members(lifetimes) // 2
        noise, score = self.perturb(problem, pairs, mean)
        rows = group.own(torch.arange(lifetimes, device=mean.device))
        sign = (1 - 2 * (rows % 2)).unsqueeze(1)
        outcome = self.evaluate(problem, Eta(eta.unflatten(mean + sign * noise[rows // (2 * tasks)]), stacked=True))

        costs = group.gather(outcome.cost)
        laid_out = costs.view(pairs, tasks, 2)
        broken = group.own(laid_out.isfinite().all(2, keepdim=True).logical_not().expand_as(laid_out).reshape(-1))
        if not bool((weight := self.weigh(laid_out)).isfinite().any()):
            return Estimate(None, broken, {"loss": float("nan")})
        weight = torch.where(group.gather(outcome.lost).view(pairs, -1).any(1), torch.nan, weight)
        given = score * weight.nan_to_num(0.0).to(score).unsqueeze(1)
        metrics = seen(problem, outcome, costs, self.config.window) | {"sigma": self.sigma(problem.meta_step)}
        metrics["snr"] = signal_to_noise(given, weight.isfinite())
        return Estimate({k: g.mean(0) for k, g in eta.unflatten(given).items()}, broken, metrics)

    def perturb(self, problem: Problem, pairs: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """[pairs, d] what the first member of each pair adds to eta, and the gradient of its log-density by eta: what
        the pair's difference of costs is multiplied by."""
        generator, sigma = stream("es", self.seed, problem.meta_step), self.sigma(problem.meta_step)
        z = torch.randn(pairs, like.numel(), generator=generator, dtype=like.dtype).to(like.device)
        return sigma * z, z / sigma

    def sigma(self, meta_step: int) -> float:
        """Standard deviation of the perturbation at a meta-step."""
        return self.config.sigma * 0.5 ** (meta_step / self.config.sigma_half_life)

    def weigh(self, costs: Tensor) -> Tensor:
        """[pairs] half the difference of the members' shaped costs, from those of their lifetimes [pairs, tasks, 2];
        not a number where there is none."""
        if self.config.shaping == "rank":
            member = costs.mean(1)
        else:
            member = torch.where(costs.isfinite().all(2, keepdim=True), costs, torch.nan).nanmean(1)
        if not bool(member.isfinite().any()):
            return torch.full_like(member[:, 0], torch.nan)
        shaped = SHAPING[self.config.shaping](member)
        return (shaped[:, 0] - shaped[:, 1]) / 2
