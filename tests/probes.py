"""Probe environments (Jones, "Debugging RL, Without the Agonizing Pain", 2021): tiny tasks whose answer is known.

Each tests one more part of an algorithm than the one before, so the first that fails says which part is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.nn.functional import one_hot

from learned_rl.tasks.base import TaskFamily, TaskVectorEnv


@dataclass(frozen=True)
class Probe:
    """What there is to know about one probe.

    Attributes:
        states:  how many observations there are.
        actions: how many actions.
        length:  environment steps of an episode.
        reward:  (state [N], action [N], step [N]) -> [N].
        chain:   step k of an episode is in state k; otherwise a state is drawn and stays.
        timeout: the episode's end is a time limit (truncation) rather than a termination.
        values:  state -> value of the best policy.
        best:    state -> best action.
    """

    states: int
    actions: int
    length: int
    reward: Callable[[Tensor, Tensor, Tensor], Tensor]
    values: dict[int, float]
    best: dict[int, int] = field(default_factory=dict)
    chain: bool = False
    timeout: bool = False


GAMMA, LIMIT = 0.9, 4


def one(state: Tensor, action: Tensor, step: Tensor) -> Tensor:
    return torch.ones_like(state, dtype=torch.float32)


PROBES = {
    "constant": Probe(1, 1, 1, one, {0: 1.0}),
    "observed": Probe(2, 1, 1, lambda s, a, t: 2.0 * s - 1, {0: -1.0, 1: 1.0}),
    "delayed": Probe(2, 1, 2, lambda s, a, t: (t == 1).float(), {0: GAMMA, 1: 1.0}, chain=True),
    "acted": Probe(1, 2, 1, lambda s, a, t: 1.0 - 2 * a, {0: 1.0}, {0: 0}),
    "both": Probe(2, 2, 1, lambda s, a, t: 2.0 * (a == s) - 1, {0: 1.0, 1: 1.0}, {0: 0, 1: 1}),
    "truncated": Probe(1, 1, LIMIT, one, {0: 1 / (1 - GAMMA)}, timeout=True),
    "terminated": Probe(
        LIMIT,
        1,
        LIMIT,
        one,
        {k: (1 - GAMMA ** (LIMIT - k)) / (1 - GAMMA) for k in range(LIMIT)},
        chain=True,
    ),
}


class ProbeFamily(TaskFamily):
    """One probe; `as_numbers` shows states as one-hot vectors instead of integers."""

    name, presets = "probe", tuple(PROBES)

    def __init__(self, preset: str, as_numbers: bool = False) -> None:
        self.probe, self.as_numbers = PROBES[preset], as_numbers
        self.max_episode_steps = self.probe.length
        self.observation_space = Box(0.0, 1.0, (self.probe.states,)) if as_numbers else Discrete(self.probe.states)
        self.action_space = Discrete(self.probe.actions)

    def sample(self, n, generator):
        return {"nothing": torch.zeros(n)}

    def make(self, tasks, copies, seed, device="cpu"):
        return ProbeVectorEnv(self, tasks, copies, seed, device)

    def show(self, state: Tensor) -> Tensor:
        """Observations of states `[...]`."""
        return one_hot(state, self.probe.states).float() if self.as_numbers else state


class ProbeVectorEnv(TaskVectorEnv):
    """`N` copies of one probe."""

    state_names = ("state",)

    def __init__(self, family: ProbeFamily, *args) -> None:
        self.family, self.probe = family, family.probe
        super().__init__(family, *args)

    @property
    def time_limit(self) -> Tensor:
        return torch.tensor(self.probe.length if self.probe.timeout else self.probe.length + 1)

    def _allocate(self) -> None:
        self.state = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)

    def _begin(self, mask: Tensor) -> None:
        drawn = (self._uniform(self.num_envs) * self.probe.states).long()
        self.state = torch.where(mask, torch.zeros_like(drawn) if self.probe.chain else drawn, self.state)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward = self.probe.reward(self.state, action, self.elapsed)
        ended = (self.elapsed == self.probe.length - 1) & (not self.probe.timeout)
        if self.probe.chain:
            self.state = (self.state + 1).clamp(max=self.probe.states - 1)
        return reward, ended

    def _observe(self) -> Tensor:
        return self.family.show(self.state)
