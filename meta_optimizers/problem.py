"""What an estimator sees: P inner processes side by side, each moved, update by update, under the meta-parameters.

An estimator knows nothing of reinforcement learning, and a problem nothing of estimators, so that each of one works on
each of the other: agents that learn (`meta_optimizers.learning`), or a quadratic whose meta-gradient is known in closed
form (`experiments.oracles`). A problem's `step` is a pure function of state, data and meta-parameters; whatever acts,
draws or counts is in `collect`. That is why a step can be differentiated, run again in a backward sweep, or run under
other meta-parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from learned_rl.component import Metrics
from learned_rl.types import Tree, UserError
from meta_optimizers.group import Group


@dataclass(frozen=True)
class Eta:
    """Meta-parameters: one set for all lifetimes, or one for each.

    Attributes:
        values:  name -> tensor, with a leading axis P if `stacked`.
        stacked: whether every lifetime has its own.
    """

    values: Tree
    stacked: bool = False

    def map(self, f: Callable[[Tensor], Tensor]) -> Eta:
        return Eta({k: f(v) for k, v in self.values.items()}, self.stacked)

    def leaf(self, lifetimes: int | None = None) -> Eta:
        """The same values, to differentiate by; with a copy for each of `lifetimes`, if given and not stacked yet."""
        values = {k: v.detach() for k, v in self.values.items()}  # stop: a gradient by these begins here
        if lifetimes is not None and not self.stacked:
            values = {k: v.expand(lifetimes, *v.shape).contiguous() for k, v in values.items()}
        return Eta({k: v.requires_grad_() for k, v in values.items()}, self.stacked or lifetimes is not None)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.values.values())

    def unflatten(self, flat: Tensor) -> Tree:
        """name -> tensor [..., *shape] from vectors [..., d], in the order of `values`; the shapes of one set."""
        shapes = {k: v.shape[int(self.stacked) :] for k, v in self.values.items()}
        pieces = flat.split([shape.numel() for shape in shapes.values()], -1)
        return {k: x.reshape((*flat.shape[:-1], *shape)) for (k, shape), x in zip(shapes.items(), pieces, strict=True)}

    def flatten(self, values: Tree | None = None) -> Tensor:
        """[d] from the values or from a tree like them, or [P, d] if stacked; in the order of `values`."""
        tree = self.values if values is None else values
        return torch.cat([tree[k].reshape(*tree[k].shape[: int(self.stacked)], -1) for k in self.values], -1)


@dataclass(frozen=True)
class Moved:
    """One inner update, seen from the outside.

    Attributes:
        state:    name -> [P, ...] after the update.
        loss:     [P] outer loss of the state before the update on the data that it learned from, as `judge` says it.
        penalty:  [P] terms of the outer loss on what the component said in this update; zero where there are none.
        log_prob: [P] log-probability, under the state before the update, of everything that was sampled into the data
                  (a sum, in nats); zero where nothing is sampled.
        alive:    [P] bool: state and data were finite.
        metrics:  name -> [P], to look at.
    """

    state: Tree
    loss: Tensor
    penalty: Tensor
    log_prob: Tensor
    alive: Tensor
    metrics: Metrics = field(default_factory=dict)


Match = Literal["kl", "value", "parameters"]


class Problem(ABC):
    """P inner processes.

    A state is a flat tree of tensors [P, ...]; its entry "theta" [P, D] holds the parameters that inner gradients move.

    Attributes:
        lifetimes: P, in this process.
        group:     the processes over which all lifetimes are spread.
        meta_step: updates of eta so far, for what is scheduled over them.
    """

    lifetimes: int
    group: Group
    meta_step: int = 0

    @abstractmethod
    def present(self) -> Tree:
        """Where every lifetime stands, as constants."""

    @abstractmethod
    def collect(self, state: Tree) -> Tree:
        """What the next update learns from, at `state`: constants, name -> tensor. The world goes on by it."""

    @abstractmethod
    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        """One inner update, as a pure function; with a graph where grad mode is on."""

    @abstractmethod
    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        """[P] outer loss of `state` on `data`; differentiable in both state and eta.

        Args:
            importance: the data were collected by another state: weight them by the ratio of probabilities.
            bare:       the task's own term alone, without bonuses and regularisers.
        """

    @abstractmethod
    def cost(self, data: Tree) -> Tensor:
        """[P] how badly the state that collected the data does, as a number without derivative: what is compared by
        evolution, and what weighs log-probabilities in a score-function term."""

    @abstractmethod
    def commit(self, state: Tree) -> None:
        """Make `state` the present."""

    def descend(self, state: Tree, loss: Tensor, eta: Eta) -> Tree:
        """The state after one step of the inner update rule along the gradient of `loss [P]`; a constant.

        Raises:
            UserError: inner processes that have no such step.
        """
        raise UserError(f"{type(self).__name__} has no inner step along another loss, which bootstrapping needs.")

    def match(self, state: Tree, target: Tree, data: Tree, by: Match) -> Tensor:
        """[P] how far `state` is from the constant `target`, seen on `data`; differentiable in `state`."""
        if by == "parameters":
            return (state["theta"] - target["theta"].detach()).square().sum(1)  # stop: the target is a constant
        raise UserError(f"{type(self).__name__} cannot match by {by!r}: expected 'parameters'.")

    def renew(self, broken: Tensor) -> Tensor:
        """Begin anew the lifetimes that ended or broke (`broken [P]`, bool); which ones, [P] bool."""
        return torch.zeros_like(broken)

    def report(self) -> dict[str, float]:
        """What to log of the inner processes since the last report."""
        return {}

    def state_dict(self) -> Tree:
        """Everything that the next step depends on."""
        return {}

    def load_state_dict(self, state: Tree) -> None:
        """Continue from a saved state."""
        return

    def join(self, states: Sequence[Tree]) -> Tree:
        """The state of all lifetimes, as a single process would save it, from those that the group's processes saved.

        Raises:
            UserError: inner processes that know no others.
        """
        if len(states) > 1:
            raise UserError(f"{type(self).__name__} runs in one process: expected no group of {len(states)}.")
        return states[0]

    def part(self, state: Tree) -> Tree:
        """This process's part of such a state."""
        return state

    def axis(self, name: str) -> int | None:
        """Along which axis of that entry of the data the lifetimes lie; None: it is the same for all."""
        return 0
