"""Optim4RL: an optimizer of Adam's form whose numerator and denominator are learned.

Lan, Mahmood, Yan, Xu, "Learning to Optimize for Reinforcement Learning", RLC 2024, arXiv:2302.01470; authors' code
(JAX): github.com/sail-sg/optim4rl. Two GRUs for every parameter, of which one reads the gradient g and one its square,
each with a linear output o,

    m = sign(g) exp(o_1),    v = exp(o_2),    theta' = theta - learning_rate * m / sqrt(v + eps)

so that a step always goes down the gradient and only its size is learned. A learning rate of 1e-3 suits networks on
Catch; 514 weights. The gradient is a constant of the meta-gradient.

With a `nominal` rule what is learned scales its step, from a last layer that starts at zero,

    theta' = theta + nominal step * exp(o_1 - o_2 / 2)

so that "adam" with neutral weights is Adam, and "sgd" plain gradient descent.

Deviation: the log-and-sign features of the paper's second version (`conditioned`) are off, as in the released code.

Contract 1: features are g and g^2, or with `conditioned` sign(g) and log(|g| + 1e-13) for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.component import Scalar
from learned_rl.layout import StepContext
from learned_rl.types import Tree, at_least
from meta_optimizers.coordinatewise import GRU, Coordinatewise, CoordinatewiseConfig, Dense, blockwise


@dataclass(frozen=True)
class Optim4RLConfig(CoordinatewiseConfig):
    hidden: int = 8
    """units of each GRU"""
    conditioned: bool = False
    """read sign and logarithm of the gradient instead of itself and its square"""
    eps: float = 1e-8
    """added to v below the root; a nominal rule has its own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, eps=self.eps)


class Optim4RL(Coordinatewise):
    """Two GRUs for every parameter, for the numerator and the denominator. State: `m`, `v` [P, hidden, D]."""

    name: ClassVar[str] = "optim4rl"
    Config: ClassVar[Any] = Optim4RLConfig
    suited_rate = 1e-3
    config: Optim4RLConfig

    def __init__(self, config: Optim4RLConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        inputs, zero = 2 if c.conditioned else 1, c.nominal != "none"
        self.m, self.v = GRU(inputs, c.hidden), GRU(inputs, c.hidden)
        self.log_m, self.log_v = Dense(c.hidden, 1, zero), Dense(c.hidden, 1, zero)

    def fresh(self, theta: Tensor) -> Tree:
        zeros = theta.new_zeros(len(theta), self.config.hidden, theta.shape[1])
        return {"m": zeros, "v": zeros.clone()}

    def logs(self, grad: Tensor, state: Tree) -> tuple[Tensor, Tensor, Tree]:
        """o_1, o_2 [P, D], and the GRUs' new state."""
        log_m, log_v, m, v = blockwise(self._network, grad.unsqueeze(1), state["m"], state["v"])
        return log_m.squeeze(1), log_v.squeeze(1), {"m": m, "v": v}

    def _network(self, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """o_1, o_2 [P, 1, D] and new states, from gradients [P, 1, D] and states [P, hidden, D]."""
        if self.config.conditioned:
            first = second = torch.cat([grad.sign(), (grad.abs() + 1e-13).log()], 1)
        else:
            first, second = grad, grad.square()
        m, v = self.m(first, m), self.v(second, v)
        return self.log_m(m), self.log_v(v), m, v

    def learned(self, grad: Tensor, state: Tree, theta: Tensor, context: StepContext) -> tuple[Tensor, Tree]:
        log_m, log_v, after = self.logs(grad, state)
        return grad.sign() * log_m.exp() * torch.rsqrt(log_v.exp() + self.config.eps), after

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        if self.stops_gradient:
            grad, theta = grad.detach(), theta.detach()  # stop: as in the paper
        nominal = self.by_hand(grad, state, theta, learning_rate)
        if nominal is None:
            return super().update(grad, state, theta, learning_rate, context)
        log_m, log_v, after = self.logs(grad, state)
        return nominal[0] * (log_m - log_v / 2).exp(), after | nominal[1]
