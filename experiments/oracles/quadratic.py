"""Quadratic inner losses with a learned step size and target: the meta-gradient is known in closed form.

Lifetime p descends 1/2 h |theta - c - shift|^2 with step size exp(log_rate) and is judged by 1/2 |theta|^2.
After K updates, with x_0 = theta_0 - c - shift, it stands at theta_K = c + shift + (1 - exp(log_rate) h)^K x_0, axis by
axis. `noise` adds Gaussian numbers to the target, drawn afresh at every update, as a stand-in for sampled experience.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learned_rl.types import Tree
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved, Problem


class Quadratic(Problem):
    """P quadratics in D dimensions.

    Args:
        lifetimes: P.
        noise:     standard deviation of the target's noise.
        horizon:   updates in a lifetime; None: it never ends.
        streams:   [P] which random stream each lifetime draws from; None: one each.
    """

    def __init__(
        self,
        lifetimes: int = 4,
        dimensions: int = 3,
        noise: float = 0.0,
        horizon: int | None = None,
        seed: int = 0,
        streams: Tensor | None = None,
        momentum: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.lifetimes, self.group, self.noise, self.horizon, self.momentum = (
            lifetimes,
            Group(),
            noise,
            horizon,
            momentum,
        )
        self.streams = torch.arange(lifetimes) if streams is None else streams
        generator = torch.Generator().manual_seed(seed)
        draw = lambda low, high: (  # noqa: E731
            low + (high - low) * torch.rand(lifetimes, dimensions, generator=generator, dtype=dtype)
        )[self.streams]
        self.curvature, self.centre, self.start = draw(0.5, 2.0), draw(-1.0, 1.0), draw(-2.0, 2.0)
        self.generator = generator
        self.age = torch.zeros(lifetimes)
        self._state = {"theta": self.start.clone(), "velocity": torch.zeros_like(self.start)}

    @staticmethod
    def eta(log_rate: float = -1.5, shift: float = 0.3, dtype: torch.dtype = torch.float64) -> Eta:
        """Meta-parameters to begin with."""
        return Eta({"log_rate": torch.tensor(log_rate, dtype=dtype), "shift": torch.tensor([shift], dtype=dtype)})

    def present(self) -> Tree:
        return {k: v.clone() for k, v in self._state.items()}

    def collect(self, state: Tree) -> Tree:
        self.age = self.age + 1
        theta = state["theta"].detach()  # stop: data
        noise = torch.randn(theta.shape, generator=self.generator, dtype=theta.dtype)[self.streams]
        return {"noise": self.noise * noise, "cost": 0.5 * theta.square().sum(1)}

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        values = {k: v if eta.stacked else v.unsqueeze(0) for k, v in eta.values.items()}
        theta = state["theta"]
        if graph := torch.is_grad_enabled():
            theta = theta if theta.requires_grad else theta.clone().requires_grad_()
        with torch.enable_grad():
            inner = theta if graph else theta.detach().requires_grad_()  # stop: nobody looks back
            error = inner - self.centre - values["shift"] - data["noise"]
            (gradient,) = torch.autograd.grad((0.5 * self.curvature * error.square()).sum(), inner, create_graph=graph)
        velocity = self.momentum * state["velocity"] + gradient
        moved = theta - values["log_rate"].exp().unsqueeze(-1) * velocity
        zero = theta.new_zeros(self.lifetimes)
        loss = self.judge({"theta": theta}, data, eta)
        alive = theta.detach().isfinite().all(1)  # stop: a look
        metrics = {"inner": gradient.detach().norm(dim=1)}  # stop: to look at
        return Moved({"theta": moved, "velocity": velocity}, loss, zero, zero, alive, metrics)

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        return 0.5 * state["theta"].square().sum(1)

    def cost(self, data: Tree) -> Tensor:
        return data["cost"]

    def descend(self, state: Tree, loss: Tensor, eta: Eta) -> Tree:
        (gradient,) = torch.autograd.grad(loss.sum(), state["theta"])
        rate = eta.values["log_rate"].detach().exp().unsqueeze(-1)  # stop: the target is a constant
        return state | {"theta": state["theta"].detach() - rate * gradient}  # stop: same

    def commit(self, state: Tree) -> None:
        self._state = {k: v.detach().clone() for k, v in state.items()}  # stop: the present

    def renew(self, broken: Tensor) -> Tensor:
        ended = broken if self.horizon is None else broken | (self.age >= self.horizon)
        self._state["theta"] = torch.where(ended[:, None], self.start, self._state["theta"])
        self._state["velocity"] = torch.where(ended[:, None], 0.0, self._state["velocity"])
        self.age = torch.where(ended, 0.0, self.age)
        return ended
