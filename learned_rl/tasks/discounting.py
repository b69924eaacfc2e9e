"""The discounting chain: the first of a hundred actions decides, and the best choice is paid late.

Osband et al., "Behaviour Suite for Reinforcement Learning", ICLR 2020, arXiv:1908.03568 (`discounting_chain`). The
first action selects one of five chains, which pay once, after 1, 3, 10, 30 or 100 steps: 1.1 on one of them, 1.0 on the
others. Later actions are ignored. An agent that discounts too much prefers what is paid soon.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks

#: Environment steps from the beginning to the payment of each chain.
DELAYS = (1, 3, 10, 30, 100)
STEPS = 100  # of an episode
PAYMENT, BEST_PAYMENT = 1.0, 1.1


class DiscountingFamily(BuiltInFamily):
    """The preset is the delay of the chain that pays 1.1: `1`, `3`, `10`, `30` or `100` environment steps.

    All tasks are alike: `{"best": int64 [n]}` is the number of that chain (bsuite's `mapping_seed`).
    Observation: float `[2]`, the chain (-1 before the first action) and the elapsed share of the episode.

    Raises:
        UserError: for an unknown preset.
    """

    name: ClassVar[str] = "discounting"
    presets: ClassVar[tuple[str, ...]] = tuple(map(str, DELAYS))
    max_episode_steps = STEPS

    def __init__(self, preset: str = "30") -> None:
        if preset not in self.presets:
            raise unknown("preset of the family discounting", preset, self.presets)
        self.best = self.presets.index(preset)
        bounds = np.array([[-1, 0], [len(DELAYS) - 1, 1]], np.float32)
        self.observation_space = Box(*bounds)
        self.action_space = Discrete(len(DELAYS))

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"best": torch.full((n,), self.best)}

    @property
    def vector_env(self) -> type[DiscountingVectorEnv]:
        return DiscountingVectorEnv

    def optimal_return(self, tasks: Tasks) -> Tensor:
        """1.1; actions at random collect 1.02."""
        return torch.full((len(tasks["best"]),), BEST_PAYMENT)


class DiscountingVectorEnv(TaskVectorEnv):
    """`N` chains; see `DiscountingFamily`. State: `chain` int64, -1 at first; the position is the elapsed time."""

    state_names: ClassVar[tuple[str, ...]] = ("chain",)

    def _allocate(self) -> None:
        self.chain = torch.full_like(self.elapsed, -1)
        self._delays = torch.tensor(DELAYS, device=self.device)
        self._limit = torch.tensor(STEPS, device=self.device)

    @property
    def time_limit(self) -> Tensor:
        return self._limit

    def _begin(self, mask: Tensor) -> None:
        self.chain = self.chain.masked_fill(mask, -1)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.chain = torch.where(self.elapsed == 0, action, self.chain)
        step = self.elapsed + 1
        worth = torch.where(self.chain == self.task["best"], BEST_PAYMENT, PAYMENT)
        return torch.where(step == self._delays[self.chain], worth, 0.0), step == STEPS

    def _observe(self) -> Tensor:
        return torch.stack((self.chain.float(), self.elapsed / STEPS), 1)
