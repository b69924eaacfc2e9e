"""LIRPG: an additive intrinsic reward, learned so that the environment's reward rises.

Zheng, Oh, Singh, "On Learning Intrinsic Rewards for Policy Gradient Methods", NeurIPS 2018, arXiv:1804.06459; authors'
code (TensorFlow): github.com/Hwhitetooth/lirpg. The agent is trained on

    r_t = extrinsic r^env_t + scale tanh(f(s_t, a_t))

with f a table [states, actions] for tabular tasks, a perceptron of tanh units with one output for each discrete action,
of which the chosen one counts, or a perceptron of (s, a) with one output for continuous actions. eta are the weights of
f. With plain SGD of step size alpha and without a value loss, an outer objective J of the updated agent says of it
(derived; checked in tests/test_lirpg.py)

    dJ/d eta = alpha scale sum_t (grad J(theta') . grad log pi(a_t|s_t)) sum_{k>=t} gamma^(k-t) d tanh f(s_k,a_k)/d eta

the inner sum ending with the episode: a reward rises where what led to it is what J asks for.

There are two value functions. The agent's own learns from what the reward slot returns and is the paper's V_mix without
further ado; V_ex, of the environment's reward alone, is the outer critic (`meta_optimizers/outer_critic.py`).

Deviations: by default agents are judged on their next rollout, once an update; the authors' code judges them on the
same samples by importance weights, once a minibatch (docs/objectives/lirpg.md). The paper's f for Atari is the Nature
CNN with a trunk shared with V_ex, here images are flattened; the last layer starts at zero instead of gain 1, so that a
fresh reward is the environment's (`zero`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from learned_rl.component import Context, Reward
from learned_rl.spaces import LogUniform, searched
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError, at_least

#: A space: how many there are (`Discrete`), or the shape of one (`Box`).
Size = int | tuple[int, ...]


@dataclass(frozen=True)
class LIRPGConfig:
    """Raises `UserError` for negative factors, widths below 1, and one of the two sizes without the other."""

    extrinsic: float = 1.0
    """factor of the environment's reward; 0: agents see the learned reward alone"""
    scale: float = field(default=0.01, metadata=searched(LogUniform(1e-3, 1.0)))
    """bound of the learned reward per environment step, in units of reward"""
    hidden: tuple[int, ...] = (64, 64)
    """widths of the hidden layers; tables have none"""
    zero: bool = True
    """start at a reward of zero (the table, or the last layer); off: at random ones, of the order of `scale` / 2"""
    observation: Size | None = None
    """number of states, or shape of an observation; None until `fit`"""
    action: Size | None = None
    """number of actions, or shape of a continuous one; None until `fit`"""

    def __post_init__(self) -> None:
        at_least(0, extrinsic=self.extrinsic, scale=self.scale)
        for name, size in {"hidden": self.hidden, "observation": self.observation, "action": self.action}.items():
            if size is not None:
                at_least(1, **{name: min(size if isinstance(size, tuple) else (size,), default=1)})
        if (self.observation is None) != (self.action is None):
            raise UserError(f"observation is {self.observation} and action {self.action}: expected both, or neither.")


class LIRPG(Reward):
    """The environment's reward plus a learned bounded one of state and action."""

    name: ClassVar[str] = "lirpg"
    Config: ClassVar[Any] = LIRPGConfig
    online: ClassVar[bool] = True
    config: LIRPGConfig

    def __init__(self, config: LIRPGConfig | None = None) -> None:
        super().__init__(config)
        if self.config.observation is not None:
            self._build()

    def fit(self, observation_space: gymnasium.Space, action_space: gymnasium.Space, layers: tuple[str, ...]) -> None:
        given, own = (_size(observation_space), _size(action_space)), (self.config.observation, self.config.action)
        if own == (None, None):
            self.config = dataclasses.replace(self.config, observation=given[0], action=given[1])
            self._build()
        elif own != given:
            made = f"This lirpg was made for {_said(*own)}"
            raise UserError(f"{made}, and here are {_said(*given)}: expected the same, or a fresh 'lirpg'.")

    def _build(self) -> None:
        """The table, or the network; orthogonal weights and no biases at first, as agents have them."""
        seen, taken, zero = self.config.observation, self.config.action, self.config.zero
        assert seen is not None and taken is not None
        if isinstance(seen, int) and isinstance(taken, int):
            self.table = nn.Parameter(torch.zeros(seen, taken) if zero else 0.5 * torch.randn(seen, taken))
            return
        outputs, more = (taken, 0) if isinstance(taken, int) else (1, math.prod(taken))
        widths = [(seen if isinstance(seen, int) else math.prod(seen)) + more, *self.config.hidden]
        hidden = [(_linear(a, b, math.sqrt(2)), nn.Tanh()) for a, b in itertools.pairwise(widths)]
        self.net = nn.Sequential(*itertools.chain(*hidden), _linear(widths[-1], outputs, 0.0 if zero else 1.0))

    def intrinsic(self, obs: Tensor, action: Tensor) -> Tensor:
        """[...] tanh f(s, a), before `scale`, in (-1, 1).

        Args:
            obs:    [..., *shape] numbers of any type, or [...] states.
            action: [...] discrete, or [..., A] what the policy drew, neither squashed nor clipped.

        Raises:
            UserError: nobody has told it the size of observations and actions yet.
        """
        seen, taken = self.config.observation, self.config.action
        if seen is None or taken is None:
            raise UserError("This lirpg has no size yet: plug it into PPO, or call its `fit`.")
        if isinstance(seen, int) and isinstance(taken, int):
            return torch.tanh(self.table[obs, action])
        dtype, lead = next(self.parameters()).dtype, action.shape if isinstance(taken, int) else action.shape[:-1]
        states = obs.unsqueeze(-1) == torch.arange(seen, device=obs.device) if isinstance(seen, int) else obs
        x = states.reshape(*lead, -1).to(dtype)
        if isinstance(taken, int):
            return torch.tanh(self.net(x).gather(-1, action.unsqueeze(-1)).squeeze(-1))
        return torch.tanh(self.net(torch.cat([x, action.to(dtype)], -1)).squeeze(-1))

    def forward(self, trajectory: Trajectory, context: Context) -> tuple[Tensor, Tree]:
        learned = self.intrinsic(trajectory.obs[:-1], trajectory.action)
        return self.config.extrinsic * trajectory.reward + self.config.scale * learned, {}


def _size(space: gymnasium.Space) -> Size:
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, Box):
        return tuple(space.shape)
    raise UserError(f"The reward lirpg does not take {space}: expected Discrete or Box.")


def _said(seen: Size | None, taken: Size | None) -> str:
    states = f"{seen} states" if isinstance(seen, int) else f"observations of shape {seen}"
    return f"{states} and {f'{taken} actions' if isinstance(taken, int) else f'actions of shape {taken}'}"


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
