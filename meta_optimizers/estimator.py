"""What every estimator of the meta-gradient has in common, and how to find one by name.

An estimator runs a problem's inner processes for a while and says in which direction the meta-parameters should move.
It leaves the problem at the end of what it ran. Whatever it carries from call to call (a perturbation, a trace, data
to reuse) is its own: it forgets it where a lifetime begins anew, and saves it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.component import Metrics
from learned_rl.tasks.base import check_choices
from learned_rl.types import Tree
from meta_optimizers.problem import Eta, Problem


@dataclass(frozen=True)
class Estimate:
    """A direction and what was seen on the way.

    Attributes:
        grads:   name -> gradient of the meta-loss, averaged over all lifetimes of all processes; where every lifetime
                 has meta-parameters of its own, name -> [P, ...] gradients of each one's meta-loss, zero for the
                 broken ones. None where no lifetime was finite.
        broken:  [P] bool: lifetimes that were not finite and took no part.
        metrics: name -> number.
        seen:    name -> [P], what `metrics` averages.
        move:    name -> what to add to eta instead of a gradient step, for methods that have their own.
    """

    grads: Tree | None
    broken: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    seen: Metrics = field(default_factory=dict)
    move: Tree | None = None


@dataclass(frozen=True)
class EstimatorConfig:
    """Settings that an estimator has; each has a subclass of its own."""

    def __post_init__(self) -> None:
        check_choices(self)


class Estimator(ABC):
    """Estimates the direction in which to move the meta-parameters.

    Attributes:
        name:      as it is chosen.
        stacked:   whether it runs lifetimes under meta-parameters that it perturbed (evolution does); others also
                   serve where every lifetime has meta-parameters of its own.
        staggered: whether lifetimes should stand at all ages at once (else they begin and end together).
    """

    name: ClassVar[str]
    Config: ClassVar[type[EstimatorConfig]]
    stacked: ClassVar[bool] = False
    staggered: ClassVar[bool] = True

    def __init__(self, config: Any = None, seed: int = 0) -> None:
        self.config = self.Config() if config is None else config
        self.seed = seed

    @abstractmethod
    def __call__(self, problem: Problem, eta: Eta) -> Estimate:
        """Run the problem for a window, under meta-parameters `eta`."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Inner updates of one call; lifetimes last a multiple of it where that is possible."""

    @property
    def rollouts(self) -> int:
        """Times that it asks for data in one call (the first one, where that varies)."""
        return self.updates

    def check(self, eta: Eta, lifetimes: int) -> None:
        """Whether it can serve these meta-parameters and so many lifetimes, over all processes.

        Raises:
            UserError: it cannot.
        """
        return

    def streams(self, lifetimes: int) -> Tensor:
        """[lifetimes] which random stream each lifetime draws from; those with the same one share task, initial agent
        and luck."""
        return torch.arange(lifetimes)

    def begin(self, which: Tensor, elsewhere: bool = False) -> None:
        """Forget what was carried for the lifetimes that begin anew.

        Args:
            which:     [P] bool, those of this process.
            elsewhere: some of another process do.
        """
        return

    def state_dict(self) -> Tree:
        """What is carried from call to call; tensors only."""
        return {}

    def load_state_dict(self, state: Tree) -> None:
        """Continue from a saved state."""
        return

    def axis(self, name: str, problem: Problem) -> int | None:
        """Along which axis of that entry of the state the lifetimes lie; None: every process carries the same. What is
        named `pending/...` are data of the problem."""
        return problem.axis(name.removeprefix("pending/")) if name.startswith("pending/") else None
