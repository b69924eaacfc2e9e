"""Self-tuning: numbers of the update as meta-parameters, one unconstrained number for each.

One of the oldest uses of meta-gradients. While the agent learns, the outer loop asks how its update would have ended
with another number, and moves the number there: step sizes (Sutton, "Adapting Bias by Gradient Descent", AAAI 1992),
discount and trace decay (Xu, van Hasselt, Silver, NeurIPS 2018, arXiv:1805.09801; see `mgrl`), every number of the loss
(Zahavy et al., NeurIPS 2020, arXiv:2002.12928; see `stac`). Here

    number = f(x_0 + eta),    f and x_0 as in `objectives.bijectors`;    at eta = 0 exactly the configured number

so that a fresh component is the algorithm without it. The step size may be one number for each layer of the agents. The
numbers that returns are made with may be one for each state of a table (as in the first experiment of Xu et al.): a
step's gamma and gae_lambda are those of the state that it led to, which is the state whose value and return they weigh
(for a truncated step its final observation), and its vtrace_alpha that of the state in which its action was taken. A
step that terminated led to no state; its gamma and gae_lambda have no effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from learned_rl.component import Context, Hyper, Hyperparameters, Scalar
from learned_rl.defaults import Constants, ConstantsConfig
from learned_rl.tasks.base import unknown
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError
from objectives.bijectors import BIJECTORS, NUMBERS, Bijector, Interval, canonical
from objectives.schedule import check_number

#: Which numbers may differ from step to step.
PER_STEP = ("gamma", "gae_lambda", "vtrace_alpha")


@dataclass(frozen=True)
class LearnedNumbersConfig:
    """Which numbers are learned, and where. Names may be others' as well (`bijectors.OTHER_NAMES`).

    Raises `UserError` for unknown or repeated names, none at all, and bounds that the number cannot have.
    """

    numbers: tuple[str, ...] = ("gamma",)
    """names of the learned numbers"""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name of a learned number -> the interval in which it is learned, instead of all values that it can have"""
    linear_decay: bool = False
    """let the learning rate fall linearly to zero over the lifetime, learned or not"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", canonical(self.numbers))
        if not self.numbers:
            raise UserError(f"numbers is empty: expected at least one of {', '.join(NUMBERS)}.")
        names = canonical(self.bounds, "learned number in bounds", self.numbers)
        bounds = {k: _bounds(k, v) for k, v in zip(names, self.bounds.values(), strict=True)}
        object.__setattr__(self, "bounds", bounds)

    def bijector(self, name: str) -> Bijector:
        """How a number is learned."""
        return Interval(*self.bounds[name]) if name in self.bounds else BIJECTORS[name]


def _bounds(name: str, given: Iterable[Any]) -> tuple[float, float]:
    """Checked, whatever sequence a file or a caller has."""
    try:
        low, high = (float(x) for x in given)
    except (TypeError, ValueError) as error:
        raise UserError(f"bounds of {name} are {given!r}: expected two numbers, low and high.") from error
    check_number(name, low)
    check_number(name, high)
    Interval(low, high)
    return low, high


@dataclass(frozen=True)
class SelfTunedConfig(LearnedNumbersConfig):
    """Raises `UserError` as well for layers or states of a number that cannot have them."""

    per_layer: bool = False
    """learn one learning rate for each layer of the agents"""
    per_state: tuple[str, ...] = ()
    """names among gamma, gae_lambda, vtrace_alpha of which to learn one for each state of a Discrete observation"""
    layers: int | None = None
    """L: layers of the agents if per_layer; None: those of the first agents that it meets"""
    states: int | None = None
    """S: states of the observation if per_state names any; None: those of the first observations that it meets"""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "per_state", canonical(self.per_state, "number for each state", PER_STEP))
        for name in self.per_state:
            if name not in self.numbers:
                raise unknown("learned number in per_state", name, self.numbers)
        if self.per_layer and "learning_rate" not in self.numbers:
            raise UserError(f"per_layer is on, but numbers is {', '.join(self.numbers)}: expected learning_rate in it.")

    def size(self, name: str) -> int | None:
        """How many there are of a number; None: not known before the agents are."""
        if name in self.per_state:
            return self.states
        return self.layers if self.per_layer and name == "learning_rate" else 1


class SelfTuned(Hyperparameters):
    """Numbers of the update, learned as they are."""

    name: ClassVar[str] = "self_tuned"
    Config: ClassVar[Any] = SelfTunedConfig
    online, outer_rate = True, 0.03  # a handful of numbers
    config: SelfTunedConfig

    def __init__(self, config: SelfTunedConfig | None = None) -> None:
        super().__init__(config)
        self.tuned = self.config.numbers
        self.eta = nn.ParameterDict()
        self._create()

    def _create(self) -> None:
        """The meta-parameters whose size is known by now."""
        sizes = {name: self.config.size(name) for name in self.tuned}
        like = next(self.parameters(), torch.zeros(()))
        fresh = {k: nn.Parameter(like.new_zeros(n)) for k, n in sizes.items() if n and k not in self.eta}
        known = dict(self.eta.items()) | fresh
        self.eta = nn.ParameterDict(known)  # anew, for the order that it has when the config rebuilds it

    def fit(self, observation_space: gymnasium.Space, action_space: gymnasium.Space, layers: tuple[str, ...]) -> None:
        c = self.config
        if c.per_state:
            if not isinstance(observation_space, Discrete):
                names = ", ".join(c.per_state)
                raise UserError(f"per_state is {names}: expected Discrete observations, not {observation_space}.")
            self._take("states", int(observation_space.n))
        if c.per_layer:
            self._take("layers", len(layers))
        self._create()

    def _take(self, what: str, size: int) -> None:
        if (own := getattr(self.config, what)) not in (None, size):
            raise UserError(f"component {self.name!r} was made for {own} {what}, but these agents have {size}.")
        self.config = dataclasses.replace(self.config, **{what: size})  # type: ignore[arg-type]

    def forward(self, base: Hyper, trajectory: Trajectory, context: Context) -> tuple[Hyper, Tree]:
        numbers = {name: self._number(name, getattr(base, name), trajectory) for name in self.tuned}
        return decayed(base.replace(**numbers), self.config.linear_decay, trajectory, context), {}

    def _number(self, name: str, base: Scalar | None, trajectory: Trajectory) -> Tensor:
        """[P, 1], [P, L] or [T, P, B]."""
        if name not in self.eta:
            raise UserError(f"component {self.name!r} learns {name} but has met no agents: `fit` it to them first.")
        eta = self.eta[name].to(trajectory.reward.dtype)
        if name in self.config.per_state:
            eta = eta[_states(name, trajectory)]
        return of_lifetimes(self.learned(name, base, eta), trajectory)

    def learned(self, name: str, base: Scalar | None, eta: Tensor) -> Tensor:
        """A number at eta, from the configured one."""
        bijector = self.config.bijector(name)
        return bijector(bijector.learnable(name, base), eta)


def _states(name: str, trajectory: Trajectory) -> Tensor:
    """[T, P, B] the state to which a number of each step belongs."""
    obs, final = trajectory.obs, trajectory.final_obs
    if name == "vtrace_alpha":
        return obs[:-1]
    return obs[1:] if final is None else trajectory.following(obs, final)


def of_lifetimes(number: Tensor, trajectory: Trajectory) -> Tensor:
    """A number that is the same for all lifetimes ([n]) as [P, n]; one that is not ([P, n], [T, P, B]) as it is."""
    lifetimes = trajectory.reward.shape[1]
    return number.expand(torch.broadcast_shapes(number.shape, (lifetimes, 1)))


def decayed(hyper: Hyper, linear_decay: bool, trajectory: Trajectory, context: Context) -> Hyper:
    """The numbers with the configured schedule of the learning rate."""
    return Constants(ConstantsConfig(linear_decay))(hyper, trajectory, context)[0]
