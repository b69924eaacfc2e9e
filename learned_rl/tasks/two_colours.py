"""Two colours: a grid world without episodes in which good and bad change places again and again.

The task of Flennerhag et al., "Bootstrapped Meta-Learning", ICLR 2022, arXiv:2109.04504, and Luketina, Flennerhag,
Schroecker, Abel, Zahavy, Singh, "Meta-Gradients in Non-Stationary Environments", 2022, arXiv:2209.06159. An agent and
two objects lie on three distinct cells of a 5 x 5 grid. A move off the grid leaves the agent where it is. Reaching one
object pays +1, the other -1, every other step -0.04; which is which swaps every `period` environment steps of the copy,
and nothing that is observed says so.

What comes back after an object was reached is told in two ways. Here only that object goes to a random free cell and
the agent stays; presets ending with `-respawn` draw the agent and both objects anew, as the text of Luketina et al. has
it.

A step is a few look-ups in tables over all 25^3 placements, since streams of millions of steps are what this is for.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.nn.functional import one_hot

from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks, Tree

SIDE = 5
CELLS = SIDE**2
FREE = CELLS - 2  # where the object that was reached can come back
ACTIONS = 4
COST = 0.04
#: The time limit, in environment steps: it never comes.
NEVER = 2**62


class Tables(NamedTuple):
    """The rules. A placement is numbered `(agent * 25 + first) * 25 + second`, a pair `placement * 4 + action`.

    Attributes:
        start:       [13800] the placements on distinct cells.
        observation: [25^3, 30] float32 of each placement.
        reward:      [2 * pairs] float32, first where the first object is the good one, then where the second is.
        reaches:     [pairs] bool: an object is reached.
        successor:   [pairs * 23] the next placement, by which free cell an object that was reached comes back to.
    """

    start: Tensor
    observation: Tensor
    reward: Tensor
    reaches: Tensor
    successor: Tensor


PAIRS = CELLS**3 * ACTIONS


@cache
def tables(device: torch.device) -> Tables:
    """The tables on a device, made once."""
    cells = torch.arange(CELLS)
    y, x = cells // SIDE, cells % SIDE
    move = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # up, down, left, right
    beside = (torch.stack((y, x), 1)[:, None] + move).clamp(0, SIDE - 1) @ torch.tensor([SIDE, 1])  # [25, 4]
    agent, first, second = torch.cartesian_prod(cells, cells, cells).unbind(1)

    moved = beside[agent][:, :, None]  # [placements, 4, 1]
    objects = [which[:, None, None] for which in (first, second)]
    reached = [moved == which for which in objects]
    triples = zip(reached, objects, objects[::-1], strict=True)
    back = [torch.where(hit, _free(moved, other), at) for hit, at, other in triples]  # [placements, 4, 23] each
    successor = (moved * CELLS + back[0]) * CELLS + back[1]
    reaches = (reached[0] | reached[1]).flatten()
    worth = (reached[0].float() - reached[1].float()).flatten()  # where the first object is the good one

    seen = torch.cat([one_hot(at[cell], SIDE) for cell in (agent, first, second) for at in (x, y)], 1)
    distinct = (agent != first) & (agent != second) & (first != second)
    made = Tables(
        start=distinct.nonzero().flatten(),
        observation=seen.float(),
        reward=torch.cat((worth, -worth)) - COST * ~reaches.repeat(2),
        reaches=reaches,
        successor=successor.flatten(),
    )
    return Tables(*(table.to(device) for table in made))


def _free(*taken: Tensor) -> Tensor:
    """[..., 23] the cells other than two that are taken, in order."""
    low, high = torch.minimum(*taken), torch.maximum(*taken)
    cell = torch.arange(FREE)
    cell = cell + (cell >= low)
    return cell + (cell >= high)


class TwoColoursFamily(BuiltInFamily):
    """Two colours whose values swap every `PERIOD` environment steps: `100k`, `2500`, `25k-respawn`.

    All tasks are alike: `{"period": int64 [n]}`, in environment steps of each copy. At first the first object pays.
    Observation: float `[30]`, one-hot column and row of the agent, the first and the second object. Actions: 0 up, 1
    down, 2 left, 3 right. Episodes do not end: there is nothing but the reward per step.

    Raises:
        UserError: for a preset that is no period.
    """

    name: ClassVar[str] = "two_colours"
    presets: ClassVar[tuple[str, ...]] = ("100k", "10k", "25k", "500k", "100k-respawn")
    continuing = True
    max_episode_steps = NEVER

    def __init__(self, preset: str = "100k") -> None:
        period = re.fullmatch(r"0*([1-9]\d{0,11})(k?)(-respawn)?", preset)
        if period is None:
            raise unknown("preset of the family two_colours (PERIOD or PERIODk, from 1 step on)", preset, self.presets)
        self.period = int(period[1]) * (1000 if period[2] else 1)
        self.respawn = bool(period[3])
        self.observation_space = Box(0.0, 1.0, (6 * SIDE,))
        self.action_space = Discrete(ACTIONS)

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"period": torch.full((n,), self.period)}

    @property
    def vector_env(self) -> type[TwoColoursVectorEnv]:
        return RespawnVectorEnv if self.respawn else TwoColoursVectorEnv


class TwoColoursVectorEnv(TaskVectorEnv):
    """`N` grids; see `TwoColoursFamily`. State: the number of the `placement`; the clock is the elapsed time.

    The clocks of all copies are read on the step on which the first of them swaps, and at no other.
    """

    state_names: ClassVar[tuple[str, ...]] = ("placement",)

    def _allocate(self) -> None:
        self.rules = tables(self.device)
        self.placement = self.rules.start[:1].expand(self.num_envs).clone()
        self._no = torch.zeros_like(self._everywhere)
        self._limit = torch.tensor(NEVER, device=self.device)
        self._read_clocks()

    @property
    def time_limit(self) -> Tensor:
        return self._limit

    def _read_clocks(self) -> None:
        period = self.task["period"]
        self._half = self.elapsed // period % 2 * PAIRS  # [N] where the reward table of the present assignment begins
        self._steps_to_swap = int((period - self.elapsed % period).min())

    def _begin(self, mask: Tensor) -> None:
        start = self.rules.start
        self.placement = torch.where(mask, start.take(self._integers(len(start), self.num_envs)), self.placement)
        self._read_clocks()

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.add(action, self.placement, alpha=ACTIONS)
        reward = self.rules.reward.take(pair + self._half)
        self.placement = self._next(pair)
        self.elapsed.add_(1)
        self._steps_to_swap -= 1
        if not self._steps_to_swap:
            self._read_clocks()
        return reward, self._no

    def _next(self, pair: Tensor) -> Tensor:
        luck = self._integers(FREE, self.num_envs)
        return self.rules.successor.take(torch.add(luck, pair, alpha=FREE))

    def _observe(self) -> Tensor:
        return self.rules.observation.index_select(0, self.placement)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """As in every environment, without the cost of episodes that might end."""
        reward, no = self._advance(actions)
        obs = self._observe()
        return obs, reward, no, no, {"final_obs": obs}

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        self._read_clocks()


class RespawnVectorEnv(TwoColoursVectorEnv):
    """Two colours where reaching an object draws the whole placement anew."""

    def _next(self, pair: Tensor) -> Tensor:
        start = self.rules.start
        anew = start.take(self._integers(len(start), self.num_envs))
        return torch.where(self.rules.reaches.take(pair), anew, self.rules.successor[::FREE].take(pair))
