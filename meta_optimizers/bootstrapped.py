"""Bootstrapped meta-gradients: let the learner run ahead, and pull what came out of the window towards where it got.

Flennerhag, Schroecker, Zahavy, van Hasselt, Silver, Singh, "Bootstrapped Meta-Learning", 2022, arXiv:2109.04504. With
theta_K what comes out of K differentiated updates under eta, f the bare outer loss, and mu how two agents differ,

    theta~ = step(theta_{K+L-1}, grad f),      L(eta) = mu(theta~, theta_K) + mean_k penalty_k

L - 1 further updates under the same eta, then one step of the inner update rule along f. Everything in theta~ is a
constant, the data on which mu compares included: those of the target's last rollout. The plain meta-gradient is the
special case of the squared distance between parameters and theta~ = theta_K - 1/2 grad f.

In the paper learning goes on at theta_{K+L-1} (`continue_from` bootstrap, `bare` True). Bonnet et al., 2022,
arXiv:2211.10550, continue from theta_K (`window`, the rollouts ahead are thrown away) and keep the outer loss's entropy
bonus in f (`bare` False).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from learned_rl.component import finite
from learned_rl.spaces import Integers, searched
from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.problem import Eta, Match, Problem
from meta_optimizers.truncated import TruncatedMetaGradient, UnrollConfig, Window


@dataclass(frozen=True)
class BootstrappedConfig(UnrollConfig):
    outer_data: Literal["fresh", "fresh_reuse"] = "fresh"
    """what becomes of the data that were collected where learning goes on: fresh: thrown away; fresh_reuse: the next
    window learns from them (unless a lifetime began anew)"""
    bootstrap: int = field(default=5, metadata=searched(Integers(1, 20, log=True)))
    """L: inner updates from the window's end to the target; the last one descends the outer loss"""
    kl: float = 1.0
    """weight of the divergence of the policy from the target's, in nats"""
    value: float = 0.0
    """weight of the squared difference between values"""
    parameters: float = 0.0
    """weight of the squared distance between parameters"""
    states: Literal["last", "ahead"] = "last"
    """where policies and values are compared: on the target's last rollout, or, with less noise, on all ahead"""
    bare: bool = True
    """the target's last step descends the task's own term alone, without bonuses and regularisers, which the learner
    would chase"""
    continue_from: Literal["window", "bootstrap", "target"] = "bootstrap"
    """where learning goes on: after the window (the updates ahead are forgotten), before the target's last step, or at
    the target"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, bootstrap=self.bootstrap)
        at_least(0, kl=self.kl, value=self.value, parameters=self.parameters)
        if not self.matched:
            raise UserError("kl, value and parameters are all 0: expected at least one positive weight to match by.")
        if self.continue_from == "target" and self.outer_data == "fresh_reuse":
            raise UserError("outer_data is 'fresh_reuse', but nothing is collected at the target: expected 'fresh'.")

    @property
    def judges_end(self) -> bool:
        return False  # it is compared with the target instead

    @property
    def matched(self) -> dict[Match, float]:
        """The positive weights."""
        return {by: weight for by in get_args(Match) if (weight := getattr(self, by)) > 0}


class Bootstrapped(TruncatedMetaGradient):
    """Differentiates how far the end of a window is from where the learner gets without a graph."""

    name, Config = "bmg", BootstrappedConfig
    config: BootstrappedConfig

    @property
    def updates(self) -> int:
        ahead = {"window": 0, "bootstrap": self.config.bootstrap - 1, "target": self.config.bootstrap}
        return self.config.window + ahead[self.config.continue_from]

    @property
    def rollouts(self) -> int:
        return self.config.window + self.config.bootstrap

    def last(self, length: int) -> int:
        return length

    def run(self, problem: Problem, eta: Eta, first: Tree, length: int, recorded: list[Tree] | None = None) -> Window:
        """A window and its distance from the target; `data` end with the rollouts ahead and the target, constants."""
        window = super().run(problem, eta, first, length, recorded)
        end = window.states[-1]
        if recorded:
            target, data = recorded[-1], recorded[length:-1]
        else:
            (*path, target), data, window.metrics["target_loss"] = self.ahead(problem, end, eta)
            goes_on = {"window": (path[0], data[0]), "bootstrap": (path[-1], data[-1]), "target": (target, None)}
            window.end, window.pending = goes_on[self.config.continue_from]
        reached = finite(target["theta"])
        near = torch.where(reached.unsqueeze(1), target["theta"], end["theta"].detach())  # stop: part of the target
        seen = data if self.config.states == "ahead" else data[-1:]
        for by, weight in self.config.matched.items():
            distance = torch.stack([problem.match(end, target | {"theta": near}, each, by) for each in seen]).mean(0)
            window.loss = window.loss + weight * distance
            window.metrics[f"match_{by}"] = distance.detach()  # stop: to look at
        window.data += [*data, target]
        window.alive = window.alive & reached & window.loss.isfinite()
        return window

    def ahead(self, problem: Problem, state: Tree, eta: Eta) -> tuple[list[Tree], list[Tree], Tensor]:
        """theta_K..theta_{K+L-1} and the target; the data of all but the target; [P] loss before the last step."""
        eta = eta.map(torch.Tensor.detach)  # stop: the target is a constant
        states, data = [_constant(state)], []
        with torch.no_grad():
            for _ in range(self.config.bootstrap - 1):
                data.append(problem.collect(states[-1]))
                states.append(_constant(problem.step(states[-1], data[-1], eta).state))
            data.append(problem.collect(states[-1]))
        with torch.enable_grad():
            leaf = states[-1] | {"theta": states[-1]["theta"].clone().requires_grad_()}
            loss = problem.judge(leaf, data[-1], eta, bare=self.config.bare)
            target = problem.descend(leaf, loss, eta)
        return [*states, _constant(target)], data, loss.detach()  # stop: to look at


def _constant(state: Tree) -> Tree:
    return {k: v.detach() for k, v in state.items()}  # stop: what lies ahead is a constant
