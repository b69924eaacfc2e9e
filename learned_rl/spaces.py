"""Search spaces, written beside the settings that they range over.

    gamma: float = field(default=0.99, metadata=searched(LogOneMinus(1e-4, 0.1)))

A space says which values a setting may take and in which coordinate they are searched: a discount by the logarithm of
one minus it, a size by the exponent of two. Nothing here knows who searches: `suggest` asks anything with Optuna's
three `suggest_` methods, and population based training draws and perturbs (`draw`, `perturb`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from learned_rl.types import UserError

Coordinate = float | int | str


class Suggests(Protocol):
    """What a space asks of a trial (`optuna.Trial` has it)."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Space(ABC):
    """Values that a setting may take."""

    #: goes before a setting's name where the coordinate is not the value itself
    prefix: ClassVar[str] = ""

    def key(self, name: str) -> str:
        """The coordinate's name for a setting `name` (dotted)."""
        parent, dot, last = name.rpartition(".")
        return f"{parent}{dot}{self.prefix}{last}"

    @abstractmethod
    def suggest(self, trial: Suggests, name: str) -> Any:
        """A value that the trial proposes for the setting `name`."""

    @abstractmethod
    def encode(self, value: Any) -> Coordinate:
        """The coordinate of a value; outside the space, of the nearest one inside."""

    @abstractmethod
    def decode(self, coordinate: Any) -> Any:
        """The value at a coordinate."""

    def knows(self, coordinate: Any) -> bool:
        """Whether it is a coordinate of this kind of space."""
        return isinstance(coordinate, int | float)

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """A value, uniformly in the coordinate that is searched."""

    @abstractmethod
    def perturb(self, value: Any, rng: np.random.Generator) -> Any:
        """A value near `value`: 0.8 or 1.2 times its coordinate, or the next choice (Jaderberg et al., 2017)."""


@dataclass(frozen=True)
class _Range(Space):
    """An interval of a coordinate, searched evenly or by its logarithm."""

    low: float
    high: float
    log: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            least = "0 < " if self.log else ""
            raise UserError(f"{type(self).__name__}({self.low}, {self.high}): expected {least}low < high.")

    def suggest(self, trial: Suggests, name: str) -> Any:
        return self.decode(trial.suggest_float(self.key(name), self.low, self.high, log=self.log))

    def encode(self, value: Any) -> Coordinate:
        return min(max(float(value), self.low), self.high)

    def decode(self, coordinate: Any) -> Any:
        return float(coordinate)

    def draw(self, rng: np.random.Generator) -> Any:
        if not self.log:
            return self.decode(rng.uniform(self.low, self.high))
        return self.decode(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def perturb(self, value: Any, rng: np.random.Generator) -> Any:
        return self.decode(min(max(float(self.encode(value)) * rng.choice((0.8, 1.2)), self.low), self.high))


class Uniform(_Range):
    """Numbers from low to high, evenly."""


class LogUniform(_Range):
    """Positive numbers from low to high, evenly in their logarithm."""

    log = True


class LogOneMinus(_Range):
    """Numbers x below one, such as discounts and trace decays, evenly in log(1 - x); bounds are those of 1 - x."""

    log, prefix = True, "one_minus_"

    def encode(self, value: Any) -> Coordinate:
        return super().encode(1 - value)

    def decode(self, coordinate: Any) -> Any:
        return 1 - float(coordinate)


class LogNegative(_Range):
    """Negative numbers -x, evenly in log x; bounds are those of x."""

    log, prefix = True, "minus_"

    def encode(self, value: Any) -> Coordinate:
        return super().encode(-value)

    def decode(self, coordinate: Any) -> Any:
        return -float(coordinate)


@dataclass(frozen=True)
class Integers(Space):
    """Whole numbers from low to high, evenly, or by their logarithm."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low < 1):
            least = "1 <= " if self.log else ""
            raise UserError(f"Integers({self.low}, {self.high}): expected {least}low < high.")

    def suggest(self, trial: Suggests, name: str) -> int:
        return self.decode(trial.suggest_int(self.key(name), self.low, self.high, log=self.log))

    def encode(self, value: Any) -> Coordinate:
        return min(max(round(value), self.low), self.high)

    def decode(self, coordinate: Any) -> int:
        return int(coordinate)

    def draw(self, rng: np.random.Generator) -> int:
        if not self.log:
            return int(rng.integers(self.low, self.high + 1))
        exponent = rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5))
        return min(max(round(math.exp(exponent)), self.low), self.high)

    def perturb(self, value: Any, rng: np.random.Generator) -> int:
        return int(self.encode(value * rng.choice((0.8, 1.2))))


@dataclass(frozen=True)
class PowersOfTwo(Space):
    """Powers of two from low to high; the coordinate is the exponent."""

    low: int
    high: int
    prefix: ClassVar[str] = "log2_"

    def __post_init__(self) -> None:
        for bound in (self.low, self.high):
            if bound < 1 or bound & (bound - 1):
                raise UserError(f"PowersOfTwo({self.low}, {self.high}): {bound} is no power of two.")
        if not self.low < self.high:
            raise UserError(f"PowersOfTwo({self.low}, {self.high}): expected low < high.")

    @property
    def _exponents(self) -> tuple[int, int]:
        return self.low.bit_length() - 1, self.high.bit_length() - 1

    def suggest(self, trial: Suggests, name: str) -> int:
        return self.decode(trial.suggest_int(self.key(name), *self._exponents))

    def encode(self, value: Any) -> Coordinate:
        low, high = self._exponents
        return min(max(round(math.log2(max(value, self.low))), low), high)

    def decode(self, coordinate: Any) -> int:
        return 1 << int(coordinate)

    def draw(self, rng: np.random.Generator) -> int:
        low, high = self._exponents
        return self.decode(rng.integers(low, high + 1))

    def perturb(self, value: Any, rng: np.random.Generator) -> int:
        return self.decode(self.encode(value * rng.choice((0.5, 2.0))))


class Choice(Space):
    """One of some options, in their natural order where there is one; tuples of numbers are fine."""

    def __init__(self, *options: Any) -> None:
        if not options:
            raise UserError("Choice() has no options: expected at least one.")
        self.options = options
        self._labels = {self._label(option): option for option in options}
        if len(self._labels) < len(options):
            raise UserError(f"{self!r} has options that a storage cannot tell apart: expected distinct ones.")

    def __repr__(self) -> str:
        return f"Choice({', '.join(map(repr, self.options))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self.options == other.options

    def __hash__(self) -> int:
        return hash(self.options)

    @staticmethod
    def _label(option: Any) -> Coordinate:
        """What a storage can hold in its place: tuples become text such as 64x64."""
        return "x".join(map(str, option)) if isinstance(option, tuple) else option

    def suggest(self, trial: Suggests, name: str) -> Any:
        return self.decode(trial.suggest_categorical(self.key(name), list(self._labels)))

    def encode(self, value: Any) -> Coordinate:
        label = self._label(tuple(value) if isinstance(value, list) else value)
        if label not in self._labels:
            raise UserError(f"{value!r} is not in the search space {self!r}: choose one of its options.")
        return label

    def decode(self, coordinate: Any) -> Any:
        return self._labels[coordinate]

    def knows(self, coordinate: Any) -> bool:
        return coordinate in self._labels

    def draw(self, rng: np.random.Generator) -> Any:
        return self.options[rng.integers(len(self.options))]

    def perturb(self, value: Any, rng: np.random.Generator) -> Any:
        at = list(self._labels).index(self.encode(value)) + rng.choice((-1, 1))
        return self.options[min(max(at, 0), len(self.options) - 1)]


def searched(space: Space) -> dict[str, Space]:
    """Metadata of a dataclass field that may be searched."""
    return {"space": space}


def spaces(settings: Any, prefix: str = "") -> dict[str, Space]:
    """Every search space beside the fields of a dataclass instance and of the dataclasses in it, by dotted path."""
    found: dict[str, Space] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if "space" in f.metadata:
            found[f"{prefix}{f.name}"] = f.metadata["space"]
        elif dataclasses.is_dataclass(value):
            found |= spaces(value, f"{prefix}{f.name}.")
    return found


def get(settings: Any, path: str) -> Any:
    """The value at a dotted path through dataclasses and dictionaries."""
    for name in path.split("."):
        settings = settings[name] if isinstance(settings, dict) else getattr(settings, name)
    return settings


def replaced(settings: Any, values: dict[str, Any]) -> Any:
    """The same settings but for the values at some dotted paths, all replaced at once (checks see the whole)."""
    below: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = value
    changes = {
        name: inner[""] if "" in inner else replaced(get(settings, name), inner) for name, inner in below.items()
    }
    if isinstance(settings, dict):
        return settings | changes
    for name in changes:
        if name not in {f.name for f in dataclasses.fields(settings)}:
            raise AttributeError(f"{type(settings).__name__} has no field {name!r}")
    return dataclasses.replace(settings, **changes)
