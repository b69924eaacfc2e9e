"""Schedules: numbers of the update that change in steps over the lifetime.

Population based training (Jaderberg et al., "Population Based Training of Neural Networks", 2017, arXiv:1711.09846)
finds not numbers but schedules: what its best agent and that agent's ancestors learned with. This component replays one
on fresh agents. With boundaries 0 < b_1 < ... < b_n < 1 and values v_0, ..., v_n of a number, the update at age a of a
horizon H uses

    v_i,    i = how many boundaries are <= (a + 1/2) / H

Boundaries are shares of the lifetime, as in the linear learning-rate schedule: on a longer or shorter lifetime the
schedule is stretched, and is run through to its end. On a lifetime as long as the one it was found on, the numbers
change at the same updates. There is nothing to meta-learn in it: it has no parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from learned_rl.component import NUMBERS, Context, Hyper, Hyperparameters
from learned_rl.tasks.base import unknown
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """Raises `UserError` for names that `Hyper` does not have, and for values and boundaries that cannot be."""

    boundaries: tuple[float, ...] = ()
    """shares of the lifetime at which the numbers change, rising, between 0 and 1"""
    numbers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """name of a number -> its values in turn, one more than there are boundaries; the others stay as configured"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", _floats("boundaries", self.boundaries))
        inside = (0.0, *self.boundaries, 1.0)
        if not all(a < b for a, b in itertools.pairwise(inside)):
            raise UserError(f"boundaries is {self.boundaries}: expected rising shares of the lifetime between 0 and 1.")
        for name in self.numbers:
            if name not in NUMBERS:
                raise unknown("number in a schedule", name, NUMBERS)
        object.__setattr__(self, "numbers", {k: _floats(k, v) for k, v in self.numbers.items()})
        for name, values in self.numbers.items():
            if len(values) != len(self.boundaries) + 1:
                many = f"{len(self.boundaries) + 1} for {len(self.boundaries)} boundaries"
                raise UserError(f"{name} has {len(values)} values: expected {many}.")
            for value in values:
                check_number(name, value)


def check_number(name: str, value: float) -> None:
    """Checks a value of a number of `Hyper`.

    Raises:
        UserError: a value that the number cannot have.
    """
    if math.isnan(value):
        raise UserError(f"{name} is {value}: expected a number.")
    Hyper().replace(**{name: value})


def _floats(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    """Plain floats in a tuple, whatever sequence a file or a caller has."""
    try:
        return tuple(float(x) for x in values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is {values!r}: expected a sequence of numbers.") from error


class Schedule(Hyperparameters):
    """Numbers that change in steps over the lifetime; without settings the configured constants."""

    name: ClassVar[str] = "schedule"
    Config: ClassVar[Any] = ScheduleConfig
    config: ScheduleConfig

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        super().__init__(config)
        self.tuned = tuple(self.config.numbers)

    def forward(self, base: Hyper, trajectory: Trajectory, context: Context) -> tuple[Hyper, Tree]:
        # From the middle of the update: rounding in age / horizon cannot move a boundary to the update beside it.
        moment = (context.age + 0.5) / context.horizon
        piece = torch.bucketize(moment, moment.new_tensor(self.config.boundaries), right=True)
        values = {k: trajectory.reward.new_tensor(v) for k, v in self.config.numbers.items()}
        return base.replace(**{k: v[piece].unsqueeze(-1) for k, v in values.items()}), {}
