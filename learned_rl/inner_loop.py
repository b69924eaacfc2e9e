"""How a population moves: in place for plain training, or through `higher` so that the outer loop can look back.

Both kinds offer the same three things: `agent(obs)` at the present parameters, `theta` (their values), and
`step(loss, hyper)`. The algorithm does not know which one it drives. Every touch of `higher`, its private parts too,
is in this file.

A window of the outer loop is a chain of `GraphInner`s, each beginning where the graph of the one before ends. Windows
themselves begin at constants, so that lifetimes longer than one are truncated backpropagation with the optimizer's
state carried over.
"""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer
from torch import Tensor

from learned_rl.agents import Population
from learned_rl.architecture import AgentOutput
from learned_rl.component import Hyper, UpdateRule, finite, shield
from learned_rl.layout import StepContext
from learned_rl.rule_optimizer import RuleOptimizer
from learned_rl.types import Tree, UserError
from learned_rl.update_rules import Adam, AdamConfig, clip_norm, select_rows


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
    def step(
        self, loss: Tensor, hyper: Hyper, active: Tensor | None = None, context: StepContext | None = None
    ) -> None:
        """One step on the losses `[P]` (each lifetime descends its own); only where `active [P]`, if given.

        Args:
            context: what the rule may know of the step; its layout is the population's.
        """

    @abstractmethod
    def tell(self, hyper: Hyper) -> None:
        """Let the agents know the numbers of the update, as far as their networks are told any."""

    @abstractmethod
    def branch(self) -> None:
        """Make what was computed so far a constant of the next inner gradient (but not of the outer one)."""

    def move(
        self,
        grad: Tensor,
        theta: Tensor,
        hyper: Hyper,
        active: Tensor | None = None,
        context: StepContext | None = None,
    ) -> tuple[Tensor, Tree]:
        """The step to add to theta, and the new state, from the gradient `[P, D]`; out of place."""
        if self.rule.stops_gradient:
            grad = grad.detach()  # stop: the rule's input is a constant
        whole = finite(grad) if self.graph else None
        if whole is not None and not bool(whole.all()):  # a learned rule must not compute with what one of them broke
            grad = select_rows(whole, grad, torch.zeros_like(grad))
        clipped, rate = clip_norm(grad, hyper.max_grad_norm), hyper.learning_rate
        if isinstance(rate, Tensor) and rate.dim() > 1 and rate.shape[1] > 1:  # one for each layer
            rate = rate[:, self.population.layer]
        context = dataclasses.replace(context or StepContext(), layout=self.population.layout)
        step, state = self.rule.update(clipped, self.state, theta, rate, context)
        if told := len(self.population.agent.conditions):  # numbers that networks are told are nobody's to move
            step = torch.cat([step[:, :-told], torch.zeros_like(step[:, -told:])], 1)
        if whole is not None and not bool(whole.all()):
            step = select_rows(whole, step, torch.full_like(step, torch.nan))
        if active is not None:
            step = select_rows(active, step, torch.zeros_like(step))
            state = {k: select_rows(active, v, self.state[k]) for k, v in state.items()}
        return shield(step, 0), {k: shield(v, 0) for k, v in state.items()}


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

    def step(
        self, loss: Tensor, hyper: Hyper, active: Tensor | None = None, context: StepContext | None = None
    ) -> None:
        (grad,) = torch.autograd.grad(loss.sum(), self._theta)
        with torch.no_grad():
            step, self.state = self.move(grad, self._theta, hyper, active, context)
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
        torch_side = torch.optim.SGD([population.theta])  # of which `higher` takes the groups; the rule is ours
        self._optimizer = _HigherRule(torch_side, [population.theta], fmodel=self._fast)
        # Weak, since a cycle would keep the window's tensors until Python happens to look for cycles.
        self._optimizer.inner = weakref.proxy(self)

    @property
    def theta(self) -> Tensor:
        return self._fast.fast_params[0]

    def agent(self, obs: Tensor) -> AgentOutput:
        return self._fast(obs)

    def step(
        self, loss: Tensor, hyper: Hyper, active: Tensor | None = None, context: StepContext | None = None
    ) -> None:
        self._optimizer.given = (hyper, active, context)
        if self.rule.stops_gradient:  # nobody differentiates the gradient: half of the graph is not needed
            (grad,) = torch.autograd.grad(loss.sum(), self.theta, retain_graph=True)
            self._optimizer.follow(grad)
        else:
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
    given: tuple[Hyper, Tensor | None, StepContext | None]

    def follow(self, grad: Tensor) -> None:
        """A step along a gradient that is there already, for which `higher` has no way in."""
        (group,) = self.param_groups
        group["params"][0] = self._fmodel.fast_params[0]
        self._update([[grad]])
        self._fmodel.update_params([group["params"][0]])

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        (group,), ((grad,),) = self.param_groups, grouped_grads
        (theta,) = group["params"]
        step, self.inner.state = self.inner.move(grad, theta, *self.given)
        group["params"][0] = theta + step


class DifferentiableRule(DifferentiableOptimizer):
    """A `RuleOptimizer`, of any update rule, for the users of `higher`: `higher.innerloop_ctx(module, optimizer)`.

    Its state is carried over from the optimizer. Gradients reach the rule's own weights, and whatever `override` puts
    in the place of "lr".
    """

    def __init__(self, other: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        self.other = other
        super().__init__(other, *args, **kwargs)

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            if all(g is None for g in grads):
                continue
            rule, params = self.other.rule, group["params"]
            if rule.stops_gradient:
                grads = [None if g is None else g.detach() for g in grads]  # stop: the rule's input is a constant
            context = self.other.context(i, group["age"], params[0])
            steps, self.state[i][0] = self.other.moves(params, grads, self.state[i][0], group["lr"], context)
            group["params"] = [p + step for p, step in zip(params, steps, strict=True)]
            group["age"] += 1


class DifferentiableAdamW(DifferentiableOptimizer):
    """`torch.optim.AdamW`, which the released `higher` does not know, by our Adam; with derivatives by lr."""

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            if group["amsgrad"] or group["maximize"]:
                raise UserError("AdamW has amsgrad or maximize on, which this differentiable one lacks: turn it off.")
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            rule = Adam(AdamConfig(beta1, beta2, group["eps"], weight_decay=decay))
            for j, (p, grad) in enumerate(zip(group["params"], grads, strict=True)):
                if grad is None:
                    continue
                theta, seen = p.reshape(1, -1), self.state[i][j]
                state = rule.initial_state(theta.detach())  # stop: zeros
                if seen:
                    moments = {k: seen[name].reshape(1, -1) for k, name in _MOMENTS.items()}
                    state = moments | {"count": torch.as_tensor(seen["step"]).to(theta).reshape(1, 1)}
                step, state = rule.update(grad.reshape(1, -1), state, theta, group["lr"])
                self.state[i][j] = {name: state[k].view_as(p) for k, name in _MOMENTS.items()}
                self.state[i][j]["step"] = state["count"].reshape(())
                group["params"][j] = p + step.view_as(p)


#: Adam's moments as we and as torch call them.
_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}

higher.register_optim(RuleOptimizer, DifferentiableRule)
higher.register_optim(torch.optim.AdamW, DifferentiableAdamW)
