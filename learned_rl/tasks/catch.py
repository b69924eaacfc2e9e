"""Catch: a ball falls, a paddle in the bottom row has to be under it.

Osband et al., "Behaviour Suite for Reinforcement Learning", ICLR 2020, arXiv:1908.03568 (`catch`, 10 rows and 5
columns). The ball starts in a random column of the top row and falls one row a step; the paddle starts in column
`columns // 2` and moves left, stays or moves right. The step on which the ball reaches the bottom row pays +1 if the
paddle is there too, else -1, and terminates.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks, UserError


class CatchFamily(BuiltInFamily):
    """Catch on a board of `ROWSxCOLUMNS`, for instance `10x5`; sizes beyond the presets are welcome.

    All tasks are alike: `{"paddle": int64 [n]}` is the column where the paddle starts.
    Observation: float `[1, rows, columns]`, 1 where the ball and the paddle are. Actions: 0 left, 1 stay, 2 right.

    Raises:
        UserError: for a preset that is no board size, or a board on which some balls are out of reach.
    """

    name: ClassVar[str] = "catch"
    presets: ClassVar[tuple[str, ...]] = ("10x5", "5x5", "8x8")

    def __init__(self, preset: str = "10x5") -> None:
        size = re.fullmatch(r"(\d+)x(\d+)", preset)
        if size is None:
            raise unknown("preset of the family catch (ROWSxCOLUMNS)", preset, self.presets)
        self.rows, self.columns = int(size[1]), int(size[2])
        needed = max(self.columns // 2, 1) + 1
        if self.columns < 1 or self.rows < needed:
            raise UserError(f"catch '{preset}' cannot be won: expected COLUMNS >= 1 and ROWS >= {needed}, as in '10x5'")
        self.max_episode_steps = self.rows - 1
        self.observation_space = Box(0.0, 1.0, (1, self.rows, self.columns))
        self.action_space = Discrete(3)

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"paddle": torch.full((n,), self.columns // 2)}

    @property
    def vector_env(self) -> type[CatchVectorEnv]:
        return CatchVectorEnv

    def optimal_return(self, tasks: Tasks) -> Tensor:
        """+1: every column can be reached in time."""
        return torch.ones(len(tasks["paddle"]))


class CatchVectorEnv(TaskVectorEnv):
    """`N` boards; see `CatchFamily`. State: the columns `ball` and `paddle`; the ball's row is the elapsed time."""

    state_names: ClassVar[tuple[str, ...]] = ("ball", "paddle")

    def __init__(
        self,
        family: CatchFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.rows, self.columns = family.rows, family.columns
        super().__init__(family, tasks, copies, seed, device, streams)

    def _allocate(self) -> None:
        self.ball = torch.zeros_like(self.elapsed)
        self.paddle = self.task["paddle"].clone()
        self._copy = torch.arange(self.num_envs, device=self.device)
        self._limit = torch.tensor(self.rows - 1, device=self.device)

    @property
    def time_limit(self) -> Tensor:
        return self._limit

    def _begin(self, mask: Tensor) -> None:
        column = self._integers(self.columns, self.num_envs)
        self.ball = torch.where(mask, column, self.ball)
        self.paddle = torch.where(mask, self.task["paddle"], self.paddle)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.paddle = (self.paddle + action - 1).clamp(0, self.columns - 1)
        terminated = self.elapsed + 1 == self._limit
        return torch.where(terminated, (self.ball == self.paddle) * 2.0 - 1.0, 0.0), terminated

    def _observe(self) -> Tensor:
        board = torch.zeros(self.num_envs, 1, self.rows, self.columns, device=self.device)
        board[self._copy, 0, self.elapsed, self.ball] = 1.0
        board[self._copy, 0, -1, self.paddle] = 1.0
        return board
