"""Classic control with physics that differ from task to task.

* Cart-pole: Barto, Sutton and Anderson, "Neuronlike adaptive elements that can solve difficult learning control
  problems", IEEE Transactions on Systems, Man, and Cybernetics 13(5), 1983, without friction.
* Acrobot: Sutton, "Generalization in reinforcement learning: successful examples using sparse coarse coding", NIPS
  1995 (1996), with the equations of Sutton and Barto's book.
* Mountain car: Moore, "Efficient memory-based learning for robot control", PhD thesis, Cambridge, 1990.
* Pendulum: a uniform rod on a torque-limited pivot.

Constants, integrators, rewards, ends of episodes and time limits are those of gymnasium's CartPole-v1, Acrobot-v1,
MountainCar-v0 and Pendulum-v1. A preset named `X-default` has exactly that physics; the preset `X` multiplies
each of the system's parameters by its own factor, log-uniform in `[1/spread, spread]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks

Constants = dict[str, Tensor]


class System(ABC):
    """The equations of one mechanical system, for `N` copies at once. It holds no state.

    Attributes:
        parameters:  SI defaults by name: what a task consists of.
        spread:      largest factor by which a task's parameter differs from its default.
        start:       lower and upper bound of the uniform initial state.
        observed:    lower and upper bound of the observation.
        action_space: of one copy.
        time_limit:  environment steps after which an episode is truncated.
    """

    parameters: ClassVar[dict[str, float]]
    spread: ClassVar[float]
    start: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    observed: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    action_space: ClassVar[Space]
    time_limit: ClassVar[int]

    @abstractmethod
    def constants(self, task: Tasks) -> Constants:
        """The combinations of parameters that the equations need, each `[N]`: computed once a task."""

    @abstractmethod
    def advance(self, state: Tensor, action: Tensor, k: Constants) -> tuple[Tensor, Tensor, Tensor]:
        """One step from `state [N, d]` under `action`: `(next state [N, d], reward [N], terminated [N] bool)`."""

    def observe(self, state: Tensor) -> Tensor:
        """The observation of `state [N, d]`; by default the state itself."""
        return state


def _symmetric(*high: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(-h for h in high), high


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


class CartPole(System):
    """State and observation: cart position (m) and velocity (m/s), pole angle (rad) and angular velocity (rad/s)."""

    parameters: ClassVar = {"gravity": 9.8, "cart_mass": 1.0, "pole_mass": 0.1, "half_length": 0.5, "force": 10.0}
    spread: ClassVar = 2.0
    start: ClassVar = _symmetric(0.05, 0.05, 0.05, 0.05)
    position_limit: ClassVar = 2.4
    angle_limit: ClassVar = math.radians(12)
    observed: ClassVar = _symmetric(2 * position_limit, math.inf, 2 * angle_limit, math.inf)
    action_space: ClassVar = Discrete(2)
    time_limit: ClassVar = 500
    time_step: ClassVar = 0.02

    def constants(self, task: Tasks) -> Constants:
        total = task["cart_mass"] + task["pole_mass"]
        limits = total.new_tensor([self.position_limit, self.angle_limit])
        return {
            "gravity": task["gravity"],
            "push": task["force"] / total,
            "pole": task["pole_mass"] * task["half_length"] / total,
            "inertia": task["half_length"] * 4.0 / 3.0,
            "limits": limits,
        }

    def advance(self, state: Tensor, action: Tensor, k: Constants) -> tuple[Tensor, Tensor, Tensor]:
        _, velocity, angle, spin = state.unbind(-1)
        sin, cos = angle.sin(), angle.cos()
        push = (action * 2 - 1) * k["push"] + k["pole"] * spin.square() * sin
        spin_rate = (k["gravity"] * sin - cos * push) / (k["inertia"] - k["pole"] * cos.square())
        acceleration = push - k["pole"] * cos * spin_rate
        rate = torch.stack((velocity, acceleration, spin, spin_rate), -1)
        state = state.add(rate, alpha=self.time_step)  # explicit Euler
        terminated = (state[:, ::2].abs() > k["limits"]).any(-1)
        return state, torch.ones_like(velocity), terminated


class Acrobot(System):
    """State: joint angles (rad) and angular velocities (rad/s); observed: cos, sin of each angle, velocities.

    The goal height is half the stretched length above the pivot: 1 m with the default links. Each link's centre of
    mass is in its middle and its moment of inertia is mass times squared length: 1 kg m^2 by default.
    """

    parameters: ClassVar = {"mass_1": 1.0, "mass_2": 1.0, "length_1": 1.0, "length_2": 1.0}
    spread: ClassVar = 1.5
    start: ClassVar = _symmetric(0.1, 0.1, 0.1, 0.1)
    top_speed: ClassVar = (4 * math.pi, 9 * math.pi)
    observed: ClassVar = _symmetric(1.0, 1.0, 1.0, 1.0, *top_speed)
    action_space: ClassVar = Discrete(3)
    time_limit: ClassVar = 500
    time_step: ClassVar = 0.2
    gravity: ClassVar = 9.8

    def constants(self, task: Tasks) -> Constants:
        mass_1, mass_2, length_1, length_2 = (task[name] for name in self.parameters)
        inertia_1, inertia_2 = mass_1 * length_1**2, mass_2 * length_2**2
        centre_1, centre_2 = length_1 / 2, length_2 / 2
        outer = mass_2 * centre_2**2 + inertia_2
        return {
            "inner": mass_1 * centre_1**2 + inertia_1 + mass_2 * length_1**2 + outer,
            "outer": outer,
            "coupling": mass_2 * length_1 * centre_2,
            "weight_1": (mass_1 * centre_1 + mass_2 * length_1) * self.gravity,
            "weight_2": mass_2 * centre_2 * self.gravity,
            "length_1": length_1,
            "length_2": length_2,
            "goal": (length_1 + length_2) / 2,
            "top_speed": mass_1.new_tensor(self.top_speed),
        }

    def rate(self, state: Tensor, torque: Tensor, k: Constants) -> Tensor:
        """Time derivative of `state [N, 4]` under `torque [N]` (N m) at the second joint: M(q) q'' = f(q, q')."""
        angle_1, angle_2, spin_1, spin_2 = state.unbind(-1)
        swing = k["coupling"] * angle_2.cos()
        drag = k["coupling"] * angle_2.sin()
        inner, mixed, outer = k["inner"] + 2 * swing, k["outer"] + swing, k["outer"]
        weight_2 = k["weight_2"] * (angle_1 + angle_2).sin()
        force_1 = drag * spin_2 * (spin_2 + 2 * spin_1) - k["weight_1"] * angle_1.sin() - weight_2
        force_2 = torque - drag * spin_1.square() - weight_2
        determinant = inner * outer - mixed.square()
        spin_rate_1 = (outer * force_1 - mixed * force_2) / determinant
        spin_rate_2 = (inner * force_2 - mixed * force_1) / determinant
        return torch.stack((spin_1, spin_2, spin_rate_1, spin_rate_2), -1)

    def advance(self, state: Tensor, action: Tensor, k: Constants) -> tuple[Tensor, Tensor, Tensor]:
        torque = (action - 1).to(state.dtype)
        h = self.time_step  # fourth-order Runge-Kutta
        rate_1 = self.rate(state, torque, k)
        rate_2 = self.rate(state + h / 2 * rate_1, torque, k)
        rate_3 = self.rate(state + h / 2 * rate_2, torque, k)
        rate_4 = self.rate(state + h * rate_3, torque, k)
        state = state + h / 6 * (rate_1 + 2 * (rate_2 + rate_3) + rate_4)
        spin = torch.clamp(state[:, 2:], -k["top_speed"], k["top_speed"])
        state = torch.cat((_wrapped(state[:, :2]), spin), -1)
        height = -k["length_1"] * state[:, 0].cos() - k["length_2"] * (state[:, 0] + state[:, 1]).cos()
        terminated = height > k["goal"]
        return state, terminated.to(state.dtype) - 1.0, terminated

    def observe(self, state: Tensor) -> Tensor:
        cos, sin = state[:, :2].cos(), state[:, :2].sin()
        return torch.cat((torch.stack((cos, sin), -1).flatten(1), state[:, 2:]), -1)


class MountainCar(System):
    """State and observation: position and velocity, in Moore's units (velocity is distance a step)."""

    parameters: ClassVar = {"force": 0.001, "gravity": 0.0025}
    spread: ClassVar = 1.1
    start: ClassVar = ((-0.6, 0.0), (-0.4, 0.0))
    goal: ClassVar = 0.5
    observed: ClassVar = ((-1.2, -0.07), (0.6, 0.07))
    action_space: ClassVar = Discrete(3)
    time_limit: ClassVar = 200

    def constants(self, task: Tasks) -> Constants:
        return {name: task[name] for name in self.parameters}

    def advance(self, state: Tensor, action: Tensor, k: Constants) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = state.unbind(-1)
        (left, slowest), (right, fastest) = self.observed
        velocity = velocity + (action - 1) * k["force"] - (3 * position).cos() * k["gravity"]
        velocity = velocity.clamp(slowest, fastest)
        position = (position + velocity).clamp(left, right)
        velocity = torch.where(position <= left, velocity.clamp(min=0.0), velocity)  # the left wall stops the car
        terminated = (position >= self.goal) & (velocity >= 0)
        return torch.stack((position, velocity), -1), -torch.ones_like(position), terminated


class Pendulum(System):
    """State: angle from upright (rad) and angular velocity (rad/s); observed: cos, sin, velocity; action: N m."""

    parameters: ClassVar = {"gravity": 10.0, "mass": 1.0, "length": 1.0}
    spread: ClassVar = 1.5
    start: ClassVar = _symmetric(math.pi, 1.0)
    top_speed: ClassVar = 8.0
    top_torque: ClassVar = 2.0
    observed: ClassVar = _symmetric(1.0, 1.0, top_speed)
    action_space: ClassVar = Box(-top_torque, top_torque, (1,))
    time_limit: ClassVar = 200
    time_step: ClassVar = 0.05

    def constants(self, task: Tasks) -> Constants:
        # A uniform rod about its end: moment of inertia m l^2 / 3, weight m g at l / 2.
        return {"weight": 1.5 * task["gravity"] / task["length"], "inertia": task["mass"] * task["length"] ** 2 / 3}

    def advance(self, state: Tensor, action: Tensor, k: Constants) -> tuple[Tensor, Tensor, Tensor]:
        angle, spin = state.unbind(-1)
        torque = action.to(state.dtype).squeeze(-1).clamp(-self.top_torque, self.top_torque)
        cost = _wrapped(angle).square() + 0.1 * spin.square() + 0.001 * torque.square()
        spin = spin + self.time_step * (k["weight"] * angle.sin() + torque / k["inertia"])
        spin = spin.clamp(-self.top_speed, self.top_speed)
        state = torch.stack((angle + self.time_step * spin, spin), -1)  # semi-implicit Euler
        return state, -cost, torch.zeros_like(angle, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        angle, spin = state.unbind(-1)
        return torch.stack((angle.cos(), angle.sin(), spin), -1)


SYSTEMS: dict[str, type[System]] = {
    "cartpole": CartPole,
    "acrobot": Acrobot,
    "mountain-car": MountainCar,
    "pendulum": Pendulum,
}


class ControlFamily(BuiltInFamily):
    """One mechanical system; tasks are its parameters, float64 `[n]` each, in SI units (see `System.parameters`).

    Args:
        preset: `cartpole`, `acrobot`, `mountain-car` or `pendulum`, with `-default` for gymnasium's physics.
        dtype:  in which the environment computes, observes and rewards.

    Raises:
        UserError: for an unknown preset.
    """

    name: ClassVar[str] = "control"
    presets: ClassVar[tuple[str, ...]] = (*SYSTEMS, *(f"{name}-default" for name in SYSTEMS))

    def __init__(self, preset: str = "cartpole", dtype: torch.dtype = torch.float32) -> None:
        if preset not in self.presets:
            raise unknown("preset of the family control", preset, self.presets)
        self.system = SYSTEMS[preset.removesuffix("-default")]()
        self.spread = 1.0 if preset.endswith("-default") else self.system.spread
        self.dtype = dtype
        self.max_episode_steps = self.system.time_limit
        numpy_dtype: Any = np.float64 if dtype == torch.float64 else np.float32
        low, high = (np.array(bound, numpy_dtype) for bound in self.system.observed)
        self.observation_space = Box(low, high, dtype=numpy_dtype)
        self.action_space = self.system.action_space

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        log_spread = math.log(self.spread)
        draws = torch.rand(len(self.system.parameters), n, generator=generator, dtype=torch.float64)
        factors = ((2 * draws - 1) * log_spread).exp()
        return {name: default * f for (name, default), f in zip(self.system.parameters.items(), factors, strict=True)}

    @property
    def vector_env(self) -> type[ControlVectorEnv]:
        return ControlVectorEnv


class ControlVectorEnv(TaskVectorEnv):
    """`N` copies of one system; see `ControlFamily`. State: `state [N, d]` in the family's dtype."""

    state_names: ClassVar[tuple[str, ...]] = ("state",)

    def __init__(
        self,
        family: ControlFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.system = family.system
        self.dtype = family.dtype
        super().__init__(family, tasks, copies, seed, device, streams)

    def _allocate(self) -> None:
        low, high = (torch.tensor(bound, dtype=self.dtype, device=self.device) for bound in self.system.start)
        self._low, self._span = low, high - low
        self._limit = torch.tensor(self.system.time_limit, device=self.device)
        self.state = torch.zeros(self.num_envs, len(low), dtype=self.dtype, device=self.device)
        self._tasks_changed()

    def _tasks_changed(self) -> None:
        self.constants = self.system.constants({name: value.to(self.dtype) for name, value in self.task.items()})

    @property
    def time_limit(self) -> Tensor:
        return self._limit

    def _begin(self, mask: Tensor) -> None:
        fresh = self._low + self._span * self._uniform(*self.state.shape)
        self.state = torch.where(mask[:, None], fresh, self.state)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.state, reward, terminated = self.system.advance(self.state, action, self.constants)
        return reward, terminated

    def _observe(self) -> Tensor:
        return self.system.observe(self.state)
