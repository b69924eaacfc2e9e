"""How a population moves: in place for plain training, or through `higher` so that the outer loop can look back.

Both kinds offer the same three things: `agent(obs)` at the present parameters, `theta` (their values), and
`step(loss, hyper)`. The algorithm does not know which one it drives. Every touch of `higher`, its private parts too,
is in this file.

A window of the outer loop is a chain of `GraphInner`s, each beginning where the graph of the one before ends. Windows
themselves begin at constants, so that lifetimes longer than one are truncated backpropagation with the optimizer's
state carried over.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer
from torch import Tensor

from learned_rl.agents import AgentOutput, Population
from learned_rl.component import Hyper, UpdateRule
from learned_rl.types import Tree
from learned_rl.update_rules import RuleOptimizer, clip_norm, select_rows


class Inner(ABC):
    """A population with its optimizer state, and one way of moving it."""

    graph: bool

    def __init__(self, population: Population, rule: UpdateRule, state: Tree) -> None:
        self.population, self.rule, self.state = population, rule, state

    @property
    @abstractmethod
    def theta(self) -> Tensor:
        """[P, D] present parameters, with their graph if there is one."""

    @abstractmethod
    def agent(self, obs: Tensor) -> AgentOutput:
        """Outputs at the present parameters."""

    @abstractmethod
    def step(self, loss: Tensor, hyper: Hyper, active: Tensor | None = None) -> None:
        """One step on the losses `[P]` (each lifetime descends its own); only where `active [P]`, if given."""

    @abstractmethod
    def tell(self, hyper: Hyper) -> None:
        """Let the agents know the numbers of the update, as far as their networks are told any."""

    @abstractmethod
    def branch(self) -> None:
        """Make what was computed so far a constant of the next inner gradient (but not of the outer one)."""

    def move(self, grad: Tensor, theta: Tensor, hyper: Hyper, active: Tensor | None = None) -> tuple[Tensor, Tree]:
        """The step to add to theta, and the new state, from the gradient `[P, D]`; out of place."""
        clipped, rate = clip_norm(grad, hyper.max_grad_norm), hyper.learning_rate
        if isinstance(rate, Tensor) and rate.dim() > 1 and rate.shape[1] > 1:  # one for each layer
            rate = rate[:, self.population.layer]
        step, state = self.rule.update(clipped, self.state, theta, rate)
        if active is not None:
            step = select_rows(active, step, torch.zeros_like(step))
            state = {k: select_rows(active, v, self.state[k]) for k, v in state.items()}
        return step, state


class PlainInner(Inner):
    """Ordinary training: no graph, parameters move in place.

    Args:
        theta: [P, D] where to begin; None: the population itself moves.
    """

    graph = False

    def __init__(self, population: Population, rule: UpdateRule, state: Tree, theta: Tensor | None = None) -> None:
        super().__init__(population, rule, state)
        # stop: a copy of its own, of which nobody looks back
        self._theta = population.theta if theta is None else theta.detach().clone().requires_grad_()

    @property
    def theta(self) -> Tensor:
        return self._theta

    def agent(self, obs: Tensor) -> AgentOutput:
        return self.population.bind(self._theta)(obs)

    def tell(self, hyper: Hyper) -> None:
        if self.population.agent.conditions:
            with torch.no_grad():
                self._theta.copy_(self.population.told(self._theta, hyper))

    def branch(self) -> None:
        """Nothing to do: without an outer gradient, what was computed is simply detached."""

    def step(self, loss: Tensor, hyper: Hyper, active: Tensor | None = None) -> None:
        (grad,) = torch.autograd.grad(loss.sum(), self._theta)
        with torch.no_grad():
            step, self.state = self.move(grad, self._theta, hyper, active)
            self._theta.add_(step)


class GraphInner(Inner):
    """Part of a window of the outer loop: every step keeps its graph, through `higher`.

    Args:
        theta: [P, D] where to begin, with the graph that leads there if it has one; None: at the population's values.
    """

    graph = True

    def __init__(self, population: Population, rule: UpdateRule, state: Tree, theta: Tensor | None = None) -> None:
        super().__init__(population, rule, state)
        # copy_initial_weights: the window begins at a detached copy, so the population itself stays as it was.
        self._fast = higher.monkeypatch(population, copy_initial_weights=True)
        if theta is not None:
            # stop: constants have no graph to go on; the inner gradient needs a leaf
            self._replace(theta if theta.requires_grad else theta.detach().requires_grad_())
        torch_side = RuleOptimizer([population.theta], rule, rows=True)
        self._optimizer = _HigherRule(torch_side, [population.theta], fmodel=self._fast)
        # Weak, since a cycle would keep the window's tensors until Python happens to look for cycles.
        self._optimizer.inner = weakref.proxy(self)

    @property
    def theta(self) -> Tensor:
        return self._fast.fast_params[0]

    def agent(self, obs: Tensor) -> AgentOutput:
        return self._fast(obs)

    def step(self, loss: Tensor, hyper: Hyper, active: Tensor | None = None) -> None:
        self._optimizer.hyper, self._optimizer.active = hyper, active
        self._optimizer.step(loss.sum())
        # `higher` keeps every version of the parameters; the graph holds those that it needs.
        del self._fast._fast_params[:-1]

    def tell(self, hyper: Hyper) -> None:
        if self.population.agent.conditions:
            self._replace(self.population.told(self.theta, hyper))

    def branch(self) -> None:
        self._replace(self.theta.view_as(self.theta))

    def _replace(self, theta: Tensor) -> None:
        self._fast.update_params([theta])
        del self._fast._fast_params[:-1]

    def carry(self) -> tuple[Tensor, Tree]:
        """Parameters and optimizer state at the end of the window, as constants."""
        # stop: the window's end; what follows begins at constants
        return self.theta.detach(), {k: v.detach() for k, v in self.state.items()}


class _HigherRule(DifferentiableOptimizer):
    """An update rule as `higher` wants it. The rule's state lives in the window (`GraphInner.state`), not here."""

    inner: GraphInner
    hyper: Hyper
    active: Tensor | None

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        (group,), ((grad,),) = self.param_groups, grouped_grads
        (theta,) = group["params"]
        step, self.inner.state = self.inner.move(grad, theta, self.hyper, self.active)
        group["params"][0] = theta + step
