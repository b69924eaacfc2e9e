"""LPO, Learned Policy Optimisation: the drift of mirror learning as a small network.

Lu, Kuba, Letcher, Metz, Schroeder de Witt, Foerster, "Discovered Policy Optimisation", NeurIPS 2022, arXiv:2210.05639.
With r the probability ratio and A the normalised advantage the agent maximises mean(r A - D(r, A)). The network reads

    x(r, A) = (log r, (log r)^2, 1 - r, (1 - r)^2) and the same four times A

through one layer of tanh units to one output o, without biases, and

    base "none":  D = relu(o - xi)                               LPO from scratch: the plain policy gradient, penalised
    base "ppo":   D = relu(relu((r - clip(r)) A) + o - xi)       LPO from PPO: its clipping, corrected

At r = 1 every feature is 0, and o with them: D is never negative and is exactly zero around r = 1, whatever the weights
are. That is what mirror learning (Kuba et al., 2022, arXiv:2201.02373) asks of a drift. Everything else, value loss and
entropy bonus too, is PPO's. `dpo` is what the authors read off such a network.

With all weights zero and xi = 0, base "none" is the plain policy gradient (the surrogate r A) and base "ppo" is PPO.
Initial weights are normal: standard deviation 1 / sqrt(8) in the hidden layer, and a tenth of 1 / sqrt(width) in the
output, so that a fresh LPO begins close to its base and every weight has a meta-gradient.

The paper evolves the weights: OpenES, population 32, fitness the final return of one lifetime. Deviations: log r is
clipped to +-10 in the features, which would overflow; base "ppo" clips at the agent's `clip_range`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from learned_rl.component import Hyper
from learned_rl.defaults import PPOClip
from learned_rl.spaces import PowersOfTwo, searched
from learned_rl.tasks.base import unknown
from learned_rl.types import at_least

Base = Literal["none", "ppo"]
FEATURES = 8
LARGEST = 10.0  # bound on |log r| in the features


@dataclass(frozen=True)
class LPOConfig:
    """Raises `UserError` for a base that there is not, a width below 1, and a negative xi."""

    base: Base = "ppo"
    """what the network corrects: nothing (the plain policy gradient), or PPO's clipping"""
    width: int = field(default=128, metadata=searched(PowersOfTwo(16, 256)))
    """H: hidden units; 9 H weights in all"""
    xi: float = 1e-4
    """what the network's output must exceed to count, which makes the drift zero around r = 1"""
    normalize_advantage: bool = True
    """normalise the advantages of each minibatch and lifetime; part of the method's definition"""

    def __post_init__(self) -> None:
        if self.base not in get_args(Base):
            raise unknown("base of the objective lpo", str(self.base), get_args(Base))
        at_least(1, width=self.width)
        at_least(0, xi=self.xi)


def features(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """x(r, A) of the module's docstring: [..., 8] from two tensors [...]."""
    log_r = log_ratio.clamp(-LARGEST, LARGEST)
    one_minus_r = -torch.expm1(log_r)
    moves = torch.stack((log_r, log_r.square(), one_minus_r, one_minus_r.square()), -1)
    return torch.cat((moves, moves * advantage.unsqueeze(-1)), -1)


class LPO(PPOClip):
    """PPO's objective with a learned drift in place of clipping."""

    name, Config = "lpo", LPOConfig
    config: LPOConfig

    def __init__(self, config: LPOConfig | None = None) -> None:
        super().__init__(config)
        if self.config.base == "none":
            self.reads = tuple(k for k in self.reads if k != "clip_range")
        width = self.config.width
        self.hidden = nn.Linear(FEATURES, width, bias=False)
        self.output = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.hidden.weight, std=1 / math.sqrt(FEATURES))
        nn.init.normal_(self.output.weight, std=0.1 / math.sqrt(width))

    def drift(self, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, hyper: Hyper) -> Tensor:
        """D(r, A) of the module's docstring, elementwise; all of one shape [..., P, b]."""
        said = self.output(torch.tanh(self.hidden(features(log_ratio, advantage)))).squeeze(-1) - self.config.xi
        if self.config.base == "ppo":  # what clipping takes off the surrogate: exactly zero inside the range
            said = said + (ratio * advantage + super().policy_loss(ratio, log_ratio, advantage, hyper))
        return said.relu()

    def policy_loss(self, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, hyper: Hyper) -> Tensor:
        return self.drift(ratio, log_ratio, advantage, hyper) - ratio * advantage
