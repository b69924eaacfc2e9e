"""A random walk over five states whose reward changes sign every so many episodes.

After the second small experiment of Xu, van Hasselt, Hessel, Oh, Singh and Silver, "Meta-Gradient Reinforcement
Learning with an Objective Discovered Online", NeurIPS 2020, arXiv:2007.08433: values have to be tracked. The paper's
constants are not published; these are a choice. The walk begins in the middle, moves left or right by a fair coin, and
terminates off either end: off the left one it pays 0, off the right one z, which is +1 at first and changes its sign
every `PERIOD` episodes of the copy. Nothing that is observed shows z.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks

STATES = 5
#: Environment steps after which a walk is truncated: that happens to one in 10^62.
TIME_LIMIT = 1000


def true_values(z: Tensor) -> Tensor:
    """[..., 5] expected undiscounted reward to come from each state, while the right end pays `z [...]`."""
    return z[..., None] * torch.arange(1, STATES + 1, device=z.device) / (STATES + 1)


class RandomWalkFamily(BuiltInFamily):
    """The preset is the number of episodes of each copy after which the reward changes its sign: `1000`.

    All tasks are alike: `{"period": int64 [n]}`, in episodes of each copy. Observation: the index of the state; the
    terminal observation repeats the last one. One action, which does nothing.

    Raises:
        UserError: for a preset that is no number of episodes.
    """

    name: ClassVar[str] = "random_walk"
    presets: ClassVar[tuple[str, ...]] = ("1000", "100", "10000")
    max_episode_steps = TIME_LIMIT

    def __init__(self, preset: str = "1000") -> None:
        if not re.fullmatch(r"0*[1-9]\d{0,11}", preset):
            raise unknown("preset of the family random_walk (PERIOD, from 1 episode on)", preset, self.presets)
        self.period = int(preset)
        self.observation_space = Discrete(STATES)
        self.action_space = Discrete(1)

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"period": torch.full((n,), self.period)}

    @property
    def vector_env(self) -> type[RandomWalkVectorEnv]:
        return RandomWalkVectorEnv


class RandomWalkVectorEnv(TaskVectorEnv):
    """`N` walks; see `RandomWalkFamily`. State: `position` int64, and `episodes` int64 that the copy has ended."""

    state_names: ClassVar[tuple[str, ...]] = ("position", "episodes")

    def _allocate(self) -> None:
        self.position = torch.full_like(self.elapsed, STATES // 2)
        self.episodes = torch.zeros_like(self.elapsed)
        self._limit = torch.tensor(TIME_LIMIT, device=self.device)

    @property
    def time_limit(self) -> Tensor:
        return self._limit

    @property
    def z(self) -> Tensor:
        """[N] what the right end pays in the present episode."""
        return 1.0 - 2.0 * (self.episodes // self.task["period"] % 2)

    def _begin(self, mask: Tensor) -> None:
        self.position = self.position.masked_fill(mask, STATES // 2)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.position = self.position + 2 * self._integers(2, self.num_envs) - 1
        reward = torch.where(self.position == STATES, self.z, 0.0)
        terminated = (self.position < 0) | (self.position == STATES)
        self.episodes = self.episodes + terminated
        return reward, terminated

    def _observe(self) -> Tensor:
        return self.position.clamp(0, STATES - 1)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        self.episodes.zero_()
        return super().reset(seed=seed, options=options)

    def set_tasks(self, lifetimes: Tensor, tasks: Tasks) -> Tensor:
        self.episodes.view(self.lifetimes, self.copies)[lifetimes.to(self.device)] = 0  # a lifetime begins with z = 1
        return super().set_tasks(lifetimes, tasks)
