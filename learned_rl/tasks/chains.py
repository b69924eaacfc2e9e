"""Delayed chains: only the first action matters, and it is paid many steps later.

Oh, Hessel, Czarnecki, Xu, van Hasselt, Singh and Silver, "Discovering Reinforcement Learning Algorithms", NeurIPS 2020,
arXiv:2007.08794, appendix A ("delayed chain MDP"). Two actions. At the start a context bit says which of them is
correct; the first action leads onto the good or the bad chain; step `n` pays +1 on the good one and -1 on the bad one
and terminates. `n` is drawn once per task.

| preset | n | else |
|---|---|---|
| `short` | 5..30 | |
| `short-noisy` | 5..30 | every step before the last pays +1 or -1 by a fair coin |
| `long` | 5..50 | |
| `long-noisy` | 5..50 | as `short-noisy` |
| `distractor` | 5..30 | observed as 2 relevant and 20 random bits |

Deviation: the paper leaves open whether the correct action is fixed for a task or drawn for each episode. Here it is
drawn for each episode, and the start state shows it, so that a memoryless policy can solve every task.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv, unknown
from learned_rl.types import Tasks

RANDOM_BITS = 20


class _Chain(NamedTuple):
    shortest: int
    longest: int
    noisy: bool = False
    distractor: bool = False


_PRESETS = {
    "short": _Chain(5, 30),
    "short-noisy": _Chain(5, 30, noisy=True),
    "long": _Chain(5, 50),
    "long-noisy": _Chain(5, 50, noisy=True),
    "distractor": _Chain(5, 30, distractor=True),
}


class ChainFamily(BuiltInFamily):
    """Delayed chains; tasks are `{"length": int64 [n]}`, in environment steps.

    Observation: an index among `2 * longest` states: `c` at the start with context `c`, and
    `2 + g * (longest - 1) + t - 1` after `t = 1..longest - 1` steps on the bad (`g = 0`) or good (`g = 1`) chain; the
    terminal observation repeats the last state. With distractors: float `[22]`, two relevant bits (has the first
    action been taken; the context before it, `g` after it) and 20 fair coins, tossed anew at every step.

    Raises:
        UserError: for an unknown preset.
    """

    name: ClassVar[str] = "chain"
    presets: ClassVar[tuple[str, ...]] = tuple(_PRESETS)

    def __init__(self, preset: str = "short") -> None:
        if preset not in _PRESETS:
            raise unknown("preset of the family chain", preset, _PRESETS)
        self.chain = _PRESETS[preset]
        self.max_episode_steps = self.chain.longest
        self.action_space = Discrete(2)
        self.observation_space = (
            Box(0.0, 1.0, (2 + RANDOM_BITS,)) if self.chain.distractor else Discrete(2 * self.chain.longest)
        )

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"length": torch.randint(self.chain.shortest, self.chain.longest + 1, (n,), generator=generator)}

    @property
    def vector_env(self) -> type[ChainVectorEnv]:
        return DistractorChainVectorEnv if self.chain.distractor else ChainVectorEnv

    def optimal_return(self, tasks: Tasks) -> Tensor:
        """+1 for every task: the noise has mean zero."""
        return torch.ones(len(tasks["length"]))


class ChainVectorEnv(TaskVectorEnv):
    """`N` chains; see `ChainFamily`. State: `context` int64 and `good` bool; the position is the elapsed time."""

    state_names: ClassVar[tuple[str, ...]] = ("context", "good")

    def __init__(
        self,
        family: ChainFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.chain = family.chain
        super().__init__(family, tasks, copies, seed, device, streams)

    def _allocate(self) -> None:
        self.context = torch.zeros_like(self.elapsed)
        self.good = torch.zeros_like(self._everywhere)

    @property
    def time_limit(self) -> Tensor:
        return self.task["length"]

    def _coins(self, *shape: int) -> Tensor:
        return self._integers(2, *shape)

    def _begin(self, mask: Tensor) -> None:
        self.context = torch.where(mask, self._coins(self.num_envs), self.context)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.good = torch.where(self.elapsed == 0, action == self.context, self.good)
        terminated = self.elapsed + 1 == self.task["length"]
        pays = self.good & terminated
        if self.chain.noisy:
            pays = torch.where(terminated, pays, self._coins(self.num_envs).bool())
            return pays * 2.0 - 1.0, terminated
        return pays * 2.0 - terminated.float(), terminated

    def _observe(self) -> Tensor:
        last = self.chain.longest - 1
        position = torch.minimum(self.elapsed, self.task["length"] - 1)
        return torch.where(self.elapsed == 0, self.context, 1 + self.good * last + position)


class DistractorChainVectorEnv(ChainVectorEnv):
    """A chain seen as bits, most of which say nothing. Additional state: `distractor` float `[N, 20]`."""

    state_names: ClassVar[tuple[str, ...]] = ("context", "good", "distractor")

    def _allocate(self) -> None:
        super()._allocate()
        self.distractor = torch.zeros(self.num_envs, RANDOM_BITS, device=self.device)

    def _begin(self, mask: Tensor) -> None:
        super()._begin(mask)
        self.distractor = torch.where(mask[:, None], self._coins(*self.distractor.shape).float(), self.distractor)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        self.distractor = self._coins(*self.distractor.shape).float()
        return super()._advance(action)

    def _observe(self) -> Tensor:
        begun = self.elapsed > 0
        relevant = torch.stack((begun, torch.where(begun, self.good, self.context.bool())), -1)  # [N, 2]
        return torch.cat((relevant.float(), self.distractor), -1)  # [N, 22]
