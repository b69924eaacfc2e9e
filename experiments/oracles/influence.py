"""Influence balancing: what helps the next step hurts all later ones, so that short-sighted gradients diverge.

Vicol, Metz, Sohl-Dickstein, ICML 2021, arXiv:2112.13835, after Tallec & Ollivier, 2017, arXiv:1702.05043. A linear
state of 23 numbers that never begins anew,

    s <- A s + strength c,      A: 0.5 on the diagonal and just above it,      c: 10 times 1, then 13 times -1

is judged by 1/2 (s_0 - 1)^2. What the first ten numbers push up at once, the others, arriving later, push down further:
the optimum is strength = -1/6, and the gradient of a single step points away from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learned_rl.types import Tree
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved, Problem

NUMBERS, POSITIVE, OPTIMUM = 23, 10, -1 / 6


class Influence(Problem):
    """P copies of the system, all from s = 1; they differ only in their meta-parameters."""

    def __init__(self, lifetimes: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.lifetimes, self.group = lifetimes, Group()
        self.matrix = 0.5 * (torch.eye(NUMBERS, dtype=dtype) + torch.eye(NUMBERS, dtype=dtype).roll(1, 1).triu())
        self.push = torch.ones(NUMBERS, dtype=dtype)
        self.push[POSITIVE:] = -1
        self._state = torch.ones(lifetimes, NUMBERS, dtype=dtype)

    @staticmethod
    def eta(strength: float = 0.5, dtype: torch.dtype = torch.float64) -> Eta:
        """Meta-parameters to begin with."""
        return Eta({"strength": torch.tensor(strength, dtype=dtype)})

    def present(self) -> Tree:
        return {"theta": self._state.clone()}

    def collect(self, state: Tree) -> Tree:
        theta = state["theta"].detach()  # stop: data
        return {"cost": _cost(theta)}

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        theta, strength = state["theta"], eta.values["strength"]
        push = (strength.unsqueeze(1) if eta.stacked else strength) * self.push
        zero = theta.new_zeros(self.lifetimes)
        alive = theta.detach().isfinite().all(1)  # stop: a look
        return Moved({"theta": theta @ self.matrix.T + push}, _cost(theta), zero, zero, alive)

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        return _cost(state["theta"])

    def cost(self, data: Tree) -> Tensor:
        return data["cost"]

    def commit(self, state: Tree) -> None:
        self._state = state["theta"].detach().clone()  # stop: the present

    def renew(self, broken: Tensor) -> Tensor:
        self._state = torch.where(broken.unsqueeze(1), 1.0, self._state)
        return broken

    def state_dict(self) -> Tree:
        return self.present()

    def load_state_dict(self, state: Tree) -> None:
        self.commit(state)


def _cost(theta: Tensor) -> Tensor:
    """[P] from [P, 23]."""
    return 0.5 * (theta[:, 0] - 1).square()
