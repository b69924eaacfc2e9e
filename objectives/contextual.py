"""Contextual meta-gradients: numbers as a function of how the lifetime goes.

Luketina, Flennerhag, Schroecker, Abel, Zahavy, Singh, "Meta-Gradients in Non-Stationary Environments", CoLLAs 2022,
PMLR 199. A number that is learned by itself (`self_tuned`) can only follow a task that changes. Here a network reads
the context c of the update and says the number, so that it can answer a change at once, as it learned to:

    number = low + (high - low) sigmoid(x_0 + net(c))

The context are the mean rewards (or means and standard deviations) of the latest `memory` rollouts, newest first. The
newest is the rollout on which this update is made: it was collected before the update and is known by then. What has
not been collected yet is 0. Nothing is differentiated through the context.

The paper normalises each feature by its mean and standard deviation over a lifetime and bounds it by tanh. While a
lifetime lasts these are not known; the ones of all its rollouts so far stand for them. Without `normalise` the network
reads raw rewards, as in published replications of the two-colours grid world.

The paper trains its networks to say the middle of the interval before they are used. Here the last layer is zero at
first, which says exactly x_0 for every context: that of the configured number, or of the interval's middle.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from learned_rl.component import Context, Hyper, Hyperparameters, lifetime_mean
from learned_rl.tasks.base import check_choices
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, at_least
from objectives.bijectors import UNIT, Interval
from objectives.self_tuned import LearnedNumbersConfig, decayed

_SMALLEST = 1e-8  # added to standard deviations, which are zero while rewards do not change


@dataclass(frozen=True)
class ContextualConfig(LearnedNumbersConfig):
    """Raises `UserError` as well for sizes below 1 and words that there are not."""

    numbers: tuple[str, ...] = ("ent_coef",)
    """names of the learned numbers"""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name of a learned number -> the interval in which it is learned; (0, 1) for the others"""
    context: Literal["reward", "moments"] = "reward"
    """what is known of each rollout: its mean reward, or also the standard deviation of its rewards"""
    memory: int = 10
    """H: rollouts of which the context tells, this update's among them"""
    normalise: bool = True
    """give each feature mean 0 and standard deviation 1 over the lifetime so far, and bound it by tanh; off: raw"""
    hidden: tuple[int, ...] = (32,)
    """units of the network's hidden layers, each followed by a ReLU"""
    start: Literal["base", "middle"] = "base"
    """what a fresh network says: the configured numbers, or the middle of their intervals as in the paper"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        at_least(1, memory=self.memory, **{f"hidden[{i}]": n for i, n in enumerate(self.hidden)})

    def bijector(self, name: str) -> Interval:
        return Interval(*self.bounds[name]) if name in self.bounds else UNIT

    @property
    def features(self) -> int:
        """F: numbers known of each rollout."""
        return {"reward": 1, "moments": 2}[self.context]


class Contextual(Hyperparameters):
    """Numbers of the update, said by a network that reads the rewards of the latest rollouts."""

    name: ClassVar[str] = "contextual"
    Config: ClassVar[Any] = ContextualConfig
    online = True
    config: ContextualConfig

    def __init__(self, config: ContextualConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        self.tuned = c.numbers
        sizes = [c.memory * c.features, *c.hidden]
        layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
        last = nn.Linear(sizes[-1], len(self.tuned))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)

    def initial_memory(self, lifetimes: int) -> Tree:
        c = self.config
        memory = {"history": torch.zeros(lifetimes, c.memory, c.features)}
        if c.normalise:
            memory |= {k: torch.zeros(lifetimes, c.features) for k in ("mean", "squares")}
            memory["count"] = torch.zeros(lifetimes, 1)
        return memory

    def forward(self, base: Hyper, trajectory: Trajectory, context: Context) -> tuple[Hyper, Tree]:
        memory = self._remember(trajectory, context.memory)
        said = self.net(self._context(memory).flatten(1)).to(trajectory.reward.dtype).split(1, 1)
        numbers = {name: self._number(name, base, eta) for name, eta in zip(self.tuned, said, strict=True)}
        return decayed(base.replace(**numbers), self.config.linear_decay, trajectory, context), memory

    def _number(self, name: str, base: Hyper, eta: Tensor) -> Tensor:
        """[P, 1] from what the network says, [P, 1]."""
        interval = self.config.bijector(name)
        if self.config.start == "middle":
            return interval((interval.low + interval.high) / 2, eta)
        return interval(interval.learnable(name, getattr(base, name)), eta)

    def _remember(self, trajectory: Trajectory, memory: Tree) -> Tree:
        """The memory with this rollout: history [P, H, F], newest first, and what normalises it [P, F]."""
        reward = trajectory.reward.detach()  # stop: the context is a constant
        known = [lifetime_mean(reward)]
        if self.config.context == "moments":
            known.append(reward.std((0, 2), correction=0))
        # A lifetime whose rewards are not finite is broken; its zero gradient must not meet a NaN in the network.
        seen = torch.stack(known, -1).to(memory["history"].dtype).nan_to_num(0.0, 0.0, 0.0)
        history = torch.cat([seen.unsqueeze(1), memory["history"][:, :-1]], 1)
        if not self.config.normalise:
            return {"history": history}
        count, away = memory["count"] + 1, seen - memory["mean"]
        mean = memory["mean"] + away / count
        squares = memory["squares"] + away * (seen - mean)  # summed over rollouts
        return {"history": history, "mean": mean, "squares": squares, "count": count}

    def _context(self, memory: Tree) -> Tensor:
        """[P, H, F] what the network reads."""
        history = memory["history"].to(next(self.net.parameters()).dtype)
        if not self.config.normalise:
            return history
        mean, squares, count = (memory[k].to(history.dtype).unsqueeze(1) for k in ("mean", "squares", "count"))
        std = (squares / count).clamp(min=0).sqrt()
        there = torch.arange(history.shape[1], device=history.device)[:, None] < count  # [P, H, 1]
        return torch.where(there, torch.tanh((history - mean) / (std + _SMALLEST)), 0.0)
