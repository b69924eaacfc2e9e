"""A process of states in a row whose rewards are noise and signal by turns.

A small variant of the alternating Markov reward processes of Xu, van Hasselt and Silver, "Meta-Gradient Reinforcement
Learning", NeurIPS 2018, arXiv:1805.09801, on which one discount or trace for each state is learned; their constants are
not published. An episode visits the states 0, 1, 2, ... once each and terminates. Leaving an even state pays standard
normal noise, leaving an odd one 0.1. A discount for each state should be small on the way into noise and large on the
way into signal.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks

SIGNAL = 0.1


class AlternatingFamily(BuiltInFamily):
    """The preset is the number of states, an even one: `10`.

    All tasks are alike: `{"states": int64 [n]}`. Observation: the index of the state; the terminal observation repeats
    the last one. One action, which does nothing.

    Raises:
        UserError: for a preset that is no even number of states.
    """

    name: ClassVar[str] = "alternating"
    presets: ClassVar[tuple[str, ...]] = ("10", "4", "20")

    def __init__(self, preset: str = "10") -> None:
        if not re.fullmatch(r"\d{1,6}", preset) or int(preset) % 2 or not int(preset):
            raise unknown("preset of the family alternating (an even number of states)", preset, self.presets)
        self.states = self.max_episode_steps = int(preset)
        self.observation_space = Discrete(self.states)
        self.action_space = Discrete(1)

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"states": torch.full((n,), self.states)}

    @property
    def vector_env(self) -> type[AlternatingVectorEnv]:
        return AlternatingVectorEnv

    def optimal_return(self, tasks: Tasks) -> Tensor:
        """What every policy is paid on average: the signal, since the noise has mean zero."""
        return tasks["states"] // 2 * SIGNAL


class AlternatingVectorEnv(TaskVectorEnv):
    """`N` processes; see `AlternatingFamily`. The state is the elapsed time."""

    state_names: ClassVar[tuple[str, ...]] = ()

    def _allocate(self) -> None:
        """Nothing but the elapsed time is kept."""

    @property
    def time_limit(self) -> Tensor:
        return self.task["states"]

    def _begin(self, mask: Tensor) -> None:
        """An episode begins where the elapsed time is 0."""

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward = torch.where(self.elapsed % 2 == 0, self._normal(self.num_envs), SIGNAL)
        return reward, self.elapsed + 1 == self.task["states"]

    def _observe(self) -> Tensor:
        return torch.minimum(self.elapsed, self.task["states"] - 1)
