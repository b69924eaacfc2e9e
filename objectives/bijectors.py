"""How an unconstrained number eta becomes a hyperparameter.

A bijector f maps the real line onto what a number can be: an interval by the sigmoid, positive numbers by the
exponential. A learned number starts where the user configured it. With base = f(x_0) it is

    f(x_0 + eta)                      Interval: low + (high - low) sigmoid(x_0 + eta);   Positive: exp(x_0 + eta)

and both are computed from their difference to the base, which is exactly zero at eta = 0: the number is then the base,
bit for bit, and no logarithm of it is ever taken. An edge of an interval is reached by no finite x_0. A base there, or
beyond, starts `MARGIN` of the interval's width inside instead, and it is from this start that the number is learned.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.component import Hyper, Scalar
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

MARGIN = 1e-3  # of an interval's width: how far from an edge a number starts that was configured to be there


class Bijector(ABC):
    """A map from the real line onto the values of a number."""

    positive = False  # whether it starts from positive numbers only

    @abstractmethod
    def start(self, base: Scalar) -> Scalar:
        """The number at eta = 0."""

    @abstractmethod
    def __call__(self, base: Scalar, eta: Tensor) -> Tensor:
        """The number at eta, differentiable in eta.

        Args:
            base: configured number, a constant: a float, or a tensor that broadcasts against eta ([P, 1], [T, P, B]).
        """

    def learnable(self, name: str, base: Scalar | None) -> Scalar:
        """The base, if the number can be learned from there. Tensors are taken as they are.

        Raises:
            UserError: None, an infinite base, or one that is not positive where it has to be.
        """
        if isinstance(base, Tensor) or (base is not None and self._fits(base)):
            return base
        default = getattr(Hyper(), name)
        such = default if default is not None and self._fits(default) else _EXAMPLES[name]
        expected = f"a finite {'positive ' if self.positive else ''}number to start from, such as {such}"
        raise UserError(f"{name} is {base}, but it is to be learned: expected {expected}, or to leave it out.")

    def _fits(self, base: float) -> bool:
        return math.isfinite(base) and (base > 0 or not self.positive)


@dataclass(frozen=True)
class Interval(Bijector):
    """Numbers between low and high, by the sigmoid.

    Raises:
        UserError: bounds that are not finite and rising.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise UserError(f"the interval ({self.low}, {self.high}) is empty or infinite: expected finite low < high.")

    def start(self, base: Scalar) -> Scalar:
        margin = MARGIN * (self.high - self.low)
        if not isinstance(base, Tensor):
            return self.low + margin if base <= self.low else self.high - margin if base >= self.high else base
        inside = torch.where(base <= self.low, self.low + margin, base)
        return torch.where(base >= self.high, self.high - margin, inside)

    def __call__(self, base: Scalar, eta: Tensor) -> Tensor:
        start, width = self.start(base), self.high - self.low
        share = (start - self.low) / width
        # sigmoid(x_0 + eta) - sigmoid(x_0) with share = sigmoid(x_0)
        spread = share * torch.sigmoid(eta) + (1 - share) * torch.sigmoid(-eta)
        moved = share * (1 - share) * torch.tanh(eta / 2) / spread
        return (start + width * moved).clamp(self.low, self.high)  # where rounding is beyond an edge


@dataclass(frozen=True)
class Positive(Bijector):
    """Numbers above 0, by the exponential: eta is the logarithm of a factor."""

    positive = True

    def start(self, base: Scalar) -> Scalar:
        return base

    def __call__(self, base: Scalar, eta: Tensor) -> Tensor:
        return base * torch.exp(eta)


UNIT = Interval(0.0, 1.0)

#: How each number of `Hyper` is learned unless bounds are given.
BIJECTORS: dict[str, Bijector] = {
    "learning_rate": Positive(),
    "gamma": UNIT,
    "gae_lambda": UNIT,
    "vtrace_alpha": UNIT,
    "clip_range": UNIT,
    "clip_range_vf": Positive(),
    "pg_coef": Positive(),
    "ent_coef": UNIT,
    "vf_coef": Positive(),
    "prediction_coef": Positive(),
    "aux_coef": Positive(),
    "max_grad_norm": Positive(),
}
_EXAMPLES = {"clip_range_vf": 0.2, "ent_coef": 0.01}  # where the default is no number to start from

#: What else the literature calls a number -> its name here.
OTHER_NAMES = {
    "entropy_cost": "ent_coef",
    "value_cost": "vf_coef",
    "lambda": "gae_lambda",
    "step_size": "learning_rate",
}

#: What can be learned.
NUMBERS = tuple(f.name for f in dataclasses.fields(Hyper) if f.metadata.get("learnable"))


def canonical(names: Iterable[str], what: str = "number", choices: Collection[str] = NUMBERS) -> tuple[str, ...]:
    """The names as they are in `Hyper`.

    Raises:
        UserError: a name that is none of `choices`, or one that is there twice.
    """
    found = tuple(OTHER_NAMES.get(name, name) for name in names)
    for given, name in zip(names, found, strict=True):
        if name not in choices:
            raise unknown(what, given, choices)
        if found.count(name) > 1:
            raise UserError(f"{name} is there twice among {', '.join(found)}: expected each {what} once.")
    return found
