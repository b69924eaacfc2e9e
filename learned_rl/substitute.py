"""A component under other parameters than its own: one set of any tensors, or one for each lifetime.

Estimators differentiate a component by tensors of theirs (a leaf in the middle of a window, a sum of eta and noise,
dual numbers of forward mode), and the component itself stays as it is. With a set for each lifetime, a whole
population of an evolution strategy runs in one call, and one backward pass yields the meta-gradient of every lifetime.

A component is written for any number of lifetimes that share its parameters. So each lifetime is asked alone, as P = 1,
and `torch.vmap` runs them side by side: where a lifetime axis is in every argument and every answer is all that has to
be known here. A component that cannot run under `vmap` (it branches on a tensor's value, or writes into one) cannot
have a set of parameters for each lifetime; everything else in this library works on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from learned_rl.architecture import AgentOutput, Heads
from learned_rl.component import (
    Auxiliary,
    Batch,
    Component,
    Context,
    Hyper,
    Hyperparameters,
    Metrics,
    Objective,
    Reward,
    Scalar,
    UpdateRule,
)
from learned_rl.layout import StepContext
from learned_rl.tasks.base import unknown
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError

#: What a component says about itself.
_DESCRIBED = (
    "name",
    "contract",
    "config",
    "provenance",
    "needs_value",
    "whole_rollouts",
    "reads",
    "insensitive",
    "reports_kl",
    "target_rate",
    "regularisers",
    "differentiates_inputs",
    "tuned",
    "conditions",
    "stops_gradient",
    "reads_activity",
    "draws",
)


def substituted(component: Component, values: Tree, stacked: bool) -> Component:
    """The component as it is under other parameters; it fits the same slot, and has no parameters of its own.

    Args:
        values:  name -> tensor for each of the component's `named_parameters`, of the same shape, or [P, *shape] if
                 `stacked`. What is computed has their graph, or their tangents.
        stacked: whether every lifetime has its own. Such a component works for these P lifetimes only.

    Returns:
        A component; the given one if it has no parameters.

    Raises:
        UserError: values of other names or shapes than the component's parameters, or of unequal P.
    """
    shapes = {k: p.shape for k, p in component.named_parameters()}
    for name in values:
        if name not in shapes:
            raise unknown(f"parameter of component {component.name!r}", name, shapes)
    lead = next((v.shape[:1] for v in values.values()), torch.Size()) if stacked else torch.Size()
    for name, shape in shapes.items():
        expected = [*(lead or ["P"] * stacked), *shape]
        given = [*values[name].shape] if name in values else None
        if given != expected:
            found = "missing" if given is None else given
            raise UserError(f"parameter {name} of component {component.name!r} is {found}: expected shape {expected}")
    return _SUBSTITUTES[component.slot](component, values, lead) if shapes else component


class _Methods(nn.Module):
    """A component's methods behind the one that `functional_call` calls."""

    def __init__(self, component: Component) -> None:
        super().__init__()
        self.component = component

    def forward(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self.component, method)(*arguments)


class _Substitute(Component):
    """What the substitutes of all slots have in common.

    Args:
        lead: what stands before the shape of every value: P, or nothing.
    """

    def __init__(self, component: Component, values: Tree, lead: torch.Size) -> None:
        super().__init__(component.config)
        for name in _DESCRIBED:
            if hasattr(component, name):
                setattr(self, name, getattr(component, name))
        self._values, self._lead = {f"component.{k}": v for k, v in values.items()}, lead
        # In a tuple, which hides it from the module's registry: its parameters and its device are not ours.
        self._asked = (component, _Methods(component))

    def heads(self, action_space: gymnasium.Space) -> Heads:
        return self._asked[0].heads(action_space)

    def initial_memory(self, lifetimes: int) -> Tree:
        if self._lead:
            self._expect(lifetimes)
        return self._ask("initial_memory", (1 if self._lead else lifetimes,), (0,), 0)

    def _ask(self, method: str, given: tuple[Any, ...], axes: tuple[int, ...], answer: int | tuple[int, ...]) -> Any:
        """What a method of the component says under these parameters.

        Args:
            given:  its arguments.
            axes:   where the lifetime axis is in the tensors of each argument.
            answer: where it is in those of the answer, or of each of its parts.
        """
        methods = self._asked[1]
        if not self._lead:
            return functional_call(methods, self._values, (method, given))
        tensors, at = _tensors(given, axes)
        for x, axis in zip(tensors, at, strict=True):
            self._expect(x.shape[axis] if x.dim() > axis else 0)
        answers: list[Any] = []

        def alone(values: Tree, parts: list[Tensor]) -> list[Tensor]:
            """One lifetime, as P = 1."""
            own = _filled(given, axes, [x.unsqueeze(axis) for x, axis in zip(parts, at, strict=True)])
            answers.append(functional_call(methods, values, (method, own)))
            return [self._without(x, axis, method) for x, axis in zip(*_tensors(answers[0], answer), strict=True)]

        said = vmap(alone, in_dims=(0, at))(self._values, tensors)
        _, to = _tensors(answers[0], answer)
        return _filled(answers[0], answer, [x.movedim(0, axis) for x, axis in zip(said, to, strict=True)])

    def _expect(self, lifetimes: int) -> None:
        if lifetimes != self._lead[0]:
            known = f"component {self.name!r} has parameters for {self._lead[0]} lifetimes"
            raise UserError(f"{lifetimes} lifetimes were given: expected {self._lead[0]}, since {known}.")

    def _without(self, x: Tensor, axis: int, method: str) -> Tensor:
        """x without its lifetime axis, of size 1."""
        if x.dim() <= axis or x.shape[axis] != 1:
            said = f"{method!r} of component {self.name!r} says {[*x.shape]} of one lifetime"
            raise UserError(f"{said}: expected size 1 on axis {axis}, that of lifetimes.")
        return x.squeeze(axis)


def _each(x: Any, axis: Any, f: Callable[[Tensor, int], Tensor]) -> Any:
    """x with f(tensor, lifetime axis) in place of each tensor; `axis` of each part if x is a tuple of parts."""
    match x:
        case Tensor():
            return f(x, axis)
        case tuple():
            axes = axis if isinstance(axis, tuple) else (axis,) * len(x)
            return tuple(_each(v, a, f) for v, a in zip(x, axes, strict=True))
        case dict():
            return {k: _each(v, axis, f) for k, v in x.items()}
        case AgentOutput():
            return x.map(lambda y: f(y, axis))
        case Hyper():  # numbers of a lifetime [P, 1], or of each step [T, P, B]
            at = lambda v: 1 if isinstance(v, Tensor) and v.dim() == 3 else axis  # noqa: E731
            return dataclasses.replace(x, **{k: _each(v, at(v), f) for k, v in vars(x).items()})
        case Trajectory() | Context() | StepContext():
            return dataclasses.replace(x, **{k: _each(v, axis, f) for k, v in vars(x).items()})
    return x  # a number for all lifetimes, or None


def _tensors(x: Any, axis: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors in x, in a fixed order, and the lifetime axis of each."""
    found: list[tuple[Tensor, int]] = []

    def keep(y: Tensor, axis: int) -> Tensor:
        found.append((y, axis))
        return y

    _each(x, axis, keep)
    return [y for y, _ in found], [a for _, a in found]


def _filled(x: Any, axis: Any, tensors: Iterable[Tensor]) -> Any:
    """x with other tensors, in the order of `_tensors`."""
    left = iter(tensors)
    return _each(x, axis, lambda *_: next(left))


def _axis(out: AgentOutput) -> int:
    """Where the lifetime axis is: 1 in a rollout [T, P, B], 0 in a minibatch [P, b]."""
    return out.policy.params[0].dim() - 3  # with an axis of actions


class _Objective(_Substitute, Objective):
    def settings(self, tabular: bool) -> dict[str, Any]:
        component = self._asked[0]
        assert isinstance(component, Objective)
        return component.settings(tabular)

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        return self._ask("prepare", (trajectory, out, next_value, hyper, context), (1, 1, 1, 0, 0), (1, 0))

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        return self._ask("loss", (out, batch, hyper), (_axis(out), _axis(out), 0), (0, 0))

    def agent_regularisers(self, out: AgentOutput, action: Tensor) -> Metrics:
        return self._ask("agent_regularisers", (out, action), (_axis(out), _axis(out)), 0)

    def target_regularisers(self, batch: Batch) -> Metrics:
        return self._ask("target_regularisers", (batch,), (1,), 0)


class _Reward(_Substitute, Reward):
    def forward(self, trajectory: Trajectory, context: Context) -> tuple[Tensor, Tree]:
        return self._ask("__call__", (trajectory, context), (1, 0), (1, 0))


class _Hyperparameters(_Substitute, Hyperparameters):
    def forward(self, base: Hyper, trajectory: Trajectory, context: Context) -> tuple[Hyper, Tree]:
        return self._ask("__call__", (base, trajectory, context), (0, 1, 0), (0, 0))


class _Auxiliary(_Substitute, Auxiliary):
    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_heads: dict[str, Tensor], hyper: Hyper, context: Context
    ) -> Batch:
        return self._ask("prepare", (trajectory, out, next_heads, hyper, context), (1, 1, 1, 0, 0), 1)

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> Tensor:
        return self._ask("loss", (out, batch, hyper), (_axis(out), _axis(out), 0), 0)


class _UpdateRule(_Substitute, UpdateRule):
    def initial_state(self, theta: Tensor) -> Tree:
        return self._ask("initial_state", (theta,), (0,), 0)

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        if self._lead and isinstance(learning_rate, Tensor):  # it may be one for all lifetimes
            learning_rate = learning_rate.expand(torch.broadcast_shapes(learning_rate.shape, (len(theta), 1)))
        return self._ask("update", (grad, state, theta, learning_rate, context), (0, 0, 0, 0, 0), (0, 0))


_SUBSTITUTES: dict[str, type[_Substitute]] = {
    kind.slot: kind for kind in (_Objective, _Reward, _Hyperparameters, _Auxiliary, _UpdateRule)
}
