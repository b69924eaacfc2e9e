"""A learned schedule of the step size: a narrow valley that only a long view crosses.

Vicol, Metz, Sohl-Dickstein, ICML 2021, arXiv:2112.13835, section 5: from (1, 1), T steps of gradient descent on

    f(x) = sqrt(x_0^2 + 5) - sqrt 5 + sin(x_1)^2 exp(-5 x_0^2) + 0.25 |x_1 - 100|

with a step size that goes from exp(a) to exp(b) over the lifetime, judged by f. Ripples along x_1 fade as x_0 nears 0;
windows shorter than a lifetime see them alone, and keep the steps small. With T = 100 the sum of f over the states
1..T is 2488 at (a, b) = (-4, -4), and about 555 near (2.75, -1.75).
"""

from __future__ import annotations

import torch
from torch import Tensor

from learned_rl.types import Tree
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved, Problem


class ToySchedule(Problem):
    """P descents, all from (1, 1).

    Args:
        lifetimes: P.
        horizon:   T, updates in a lifetime.
    """

    def __init__(self, lifetimes: int = 1, horizon: int = 100, dtype: torch.dtype = torch.float64) -> None:
        self.lifetimes, self.horizon, self.group = lifetimes, horizon, Group()
        self._state = {
            "theta": torch.ones(lifetimes, 2, dtype=dtype),
            "age": torch.zeros(lifetimes, dtype=dtype),
        }

    @staticmethod
    def eta(start: float = -4.0, end: float = -4.0, dtype: torch.dtype = torch.float64) -> Eta:
        """Meta-parameters to begin with: the logarithms of the first and of the last step size."""
        return Eta({"log_rates": torch.tensor([start, end], dtype=dtype)})

    def present(self) -> Tree:
        return {k: v.clone() for k, v in self._state.items()}

    def collect(self, state: Tree) -> Tree:
        theta = state["theta"].detach()  # stop: data
        return {"cost": loss(theta)}

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        theta, age = state["theta"], state["age"]
        done = age / self.horizon
        start, end = eta.values["log_rates"].exp().unbind(-1)
        rate = start * (1 - done) + end * done
        moved = {"theta": theta - rate.unsqueeze(1) * slope(theta), "age": age + 1}
        zero = torch.zeros_like(age)
        alive = theta.detach().isfinite().all(1)  # stop: a look
        return Moved(moved, loss(theta), zero, zero, alive)

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        return loss(state["theta"])

    def cost(self, data: Tree) -> Tensor:
        return data["cost"]

    def commit(self, state: Tree) -> None:
        self._state = {k: v.detach().clone() for k, v in state.items()}  # stop: the present

    def renew(self, broken: Tensor) -> Tensor:
        ended = broken | (self._state["age"] >= self.horizon)
        self._state["theta"] = torch.where(ended.unsqueeze(1), 1.0, self._state["theta"])
        self._state["age"] = torch.where(ended, 0.0, self._state["age"])
        return ended

    def state_dict(self) -> Tree:
        return self.present()

    def load_state_dict(self, state: Tree) -> None:
        self.commit(state)


def loss(x: Tensor) -> Tensor:
    """[P] from [P, 2]."""
    a, b = x.unbind(1)
    return (a.square() + 5).sqrt() - 5**0.5 + b.sin().square() * (-5 * a.square()).exp() + 0.25 * (b - 100).abs()


def slope(x: Tensor) -> Tensor:
    """[P, 2] its gradient."""
    a, b = x.unbind(1)
    ripple = (-5 * a.square()).exp()
    by_a = a / (a.square() + 5).sqrt() - 10 * a * b.sin().square() * ripple
    return torch.stack([by_a, (2 * b).sin() * ripple + 0.25 * (b - 100).sign()], 1)
