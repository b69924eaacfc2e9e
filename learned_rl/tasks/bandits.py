"""Bandits: one state, one pull an episode, the simplest task that can be learned.

The two task distributions of few-shot meta-RL: Bernoulli arms with uniform means (Duan et al., "RL^2", 2016,
arXiv:1611.02779; Wang et al., "Learning to reinforcement learn", 2016, arXiv:1611.05763) and Gaussian arms with
standard normal means and unit noise (the ten-armed testbed of Sutton and Barto, "Reinforcement Learning", 2nd edition,
section 2.3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks


class BanditFamily(BuiltInFamily):
    """`bernoulli-K` (means uniform in [0, 1)) and `gaussian-K` (means standard normal, unit noise).

    Tasks are `{"mean": float [n, K]}`, in reward a pull. Every step is an episode; the observation is always 0.

    Raises:
        UserError: for an unknown preset.
    """

    name: ClassVar[str] = "bandit"
    presets: ClassVar[tuple[str, ...]] = ("bernoulli-5", "bernoulli-10", "bernoulli-50", "gaussian-5", "gaussian-10")

    def __init__(self, preset: str = "bernoulli-10") -> None:
        if preset not in self.presets:
            raise unknown("preset of the family bandit", preset, self.presets)
        kind, arms = preset.split("-")
        self.gaussian = kind == "gaussian"
        self.arms = int(arms)
        self.max_episode_steps = 1
        self.observation_space = Discrete(1)
        self.action_space = Discrete(self.arms)

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        draw = torch.randn if self.gaussian else torch.rand
        return {"mean": draw(n, self.arms, generator=generator)}

    @property
    def vector_env(self) -> type[BanditVectorEnv]:
        return BanditVectorEnv

    def optimal_return(self, tasks: Tasks) -> Tensor:
        """The best arm's mean."""
        return tasks["mean"].amax(-1)


class BanditVectorEnv(TaskVectorEnv):
    """`N` bandits; see `BanditFamily`. There is no state beyond the task."""

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        family: BanditFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.gaussian = family.gaussian
        super().__init__(family, tasks, copies, seed, device, streams)

    def _allocate(self) -> None:
        self._limit = torch.tensor(1, device=self.device)

    @property
    def time_limit(self) -> Tensor:
        return self._limit

    def _begin(self, mask: Tensor) -> None:
        """Nothing to do: all episodes start alike."""

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.task["mean"].gather(1, action[:, None]).squeeze(1)
        if self.gaussian:
            return mean + self._normal(self.num_envs), self._everywhere.clone()
        return (self._uniform(self.num_envs) < mean).float(), self._everywhere.clone()

    def _observe(self) -> Tensor:
        return torch.zeros_like(self.elapsed)
